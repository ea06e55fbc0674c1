"""Write .env.example from `Settings`: each setting once, with its default and its sentence.

    python tools/envexample.py           write .env.example
    python tools/envexample.py --check   fail with a diff where it says something else
"""
from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
EXAMPLE = ROOT / ".env.example"

# What docker-compose.yml and the image read beside the settings: name, default, sentence.
COMPOSE = [
    ("WEB_CONCURRENCY", "4", "Worker processes; each is good for one processor. The image by itself starts one."),
    ("REDIS_MAXMEMORY", "512mb", "When Redis is this full, what was used longest ago goes."),
    ("GRAFANA_PASSWORD", "admin", "Of Grafana's user admin; read at the first start."),
    ("GRAFANA_PORT", "3000", "Of Grafana on this machine, 127.0.0.1 only."),
    ("PROMETHEUS_PORT", "9090", "Of Prometheus on this machine, 127.0.0.1 only."),
]

HEAD = """\
# Settings. Copy this file to .env and take the # away from what you change: every line shows the default, and none is needed.
# The environment wins over .env. A value with $, # or spaces goes into 'single quotes'.
# Written by tools/envexample.py; a change belongs into the notebook of `config`, or into that tool."""

NOTES = {
    "REDIS_HOST": "Any REDIS_* here chooses Redis, and Redis only; without one, Redis on localhost:6379 if it answers, else a SQLite file.",
    "REDIS_PASSWORD": "docker compose gives it to the server and to the app.",
    "CACHE_URL": "With docker compose it replaces the Redis there: localhost would be the container itself.",
    "LLM_BASE_URL": "From docker compose a server on this machine is http://host.docker.internal:11434/v1.",
    "API_KEY": "Set it wherever others can reach the service.",
    "PORT": "With docker compose: the port on this machine.",
}


def groups() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    "What the settings of a group have in common, and their rows."
    from aurea_orchestrator.config import Settings, describe

    rows = {name: (name, default, sentence) for name, default, sentence in describe()}
    for group in reversed(Settings.__bases__):
        yield (group.__doc__ or "").rstrip("."), [rows.pop(name.upper()) for name in group.model_fields]  # type: ignore[attr-defined]
    if rows: yield "More", list(rows.values())


def text() -> str:
    "What .env.example should say."
    blocks = [HEAD]
    for title, rows in groups():
        blocks.append(f"# ---- {title}")
        for name, default, sentence in rows:
            note = f"\n# {NOTES[name]}" if name in NOTES else ""
            blocks.append(f"# {sentence.replace('`', '')}{note}\n#{name}={default}")
    # Indented, since they are no settings of the app
    table = "\n".join(f"#   {f'{name}={default}':24} # {sentence}" for name, default, sentence in COMPOSE)
    blocks.append(f"# ---- Only for docker compose (they can be set here too)\n\n{table}")
    return "\n\n".join(blocks) + "\n"


def main(argv: list[str]) -> int:
    new = text()
    if "--check" not in argv:
        EXAMPLE.write_text(new, "utf-8")
        return 0
    old = EXAMPLE.read_text("utf-8") if EXAMPLE.exists() else ""
    if old != new:
        print(*difflib.unified_diff(old.splitlines(), new.splitlines(), ".env.example", "as settings are", "", "", 2, ""), sep="\n")
        print(".env.example and Settings differ; write it anew: python tools/envexample.py")
    return old != new


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
