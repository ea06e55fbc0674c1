"""Start the app: `aurea serve` where there is one, else uvicorn.  HOST and PORT: environment, else .env, else 0.0.0.0 and 8000."""
from __future__ import annotations

import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path


def where() -> tuple[str, int]:
    "Host and port as `Settings` has them."
    from aurea_orchestrator.config import Settings
    from aurea_orchestrator.errors import ConfigError

    try:
        settings = Settings()
    except ConfigError as error:
        sys.exit(f"serve: {error}")
    return settings.host, settings.port


def refuse_if_taken(host: str, port: int) -> None:
    "Say so before anything is started."
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            cure = f"stop what uses it, or choose another: make serve PORT={port + 1 if port < 65535 else 8000}"
            sys.exit(f"serve: cannot listen on {host} port {port}: {error.strerror}; {cure}")


def main() -> None:
    host, port = where()
    refuse_if_taken(host, port)
    bin = Path(sys.executable).parent
    if find_spec("aurea_orchestrator.cli"):
        command = [str(bin / "aurea"), "serve"]
    else:
        command = [sys.executable, "-m", "uvicorn", "aurea_orchestrator.main:app", "--host", host, "--port", str(port)]
    os.execv(command[0], [*command, *sys.argv[1:]])


if __name__ == "__main__":
    main()
