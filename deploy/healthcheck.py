"""Exit 0 when the server in this container answers /health. Asks it directly, whatever HTTP_PROXY says; needs no curl."""
from __future__ import annotations

import os
import sys
from http.client import HTTPConnection, HTTPException

EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # an address to listen on is not always one to call


def main() -> str | None:
    "What is wrong, if anything."
    host, port = os.environ.get("HOST", ""), int(os.environ.get("PORT") or 8000)
    connection = HTTPConnection(EVERYWHERE.get(host, host), port, timeout=3)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        return f"no answer on port {port}: {error}"
    finally:
        connection.close()
    return None if status == 200 else f"/health answered {status}"


if __name__ == "__main__":
    sys.exit(main())
