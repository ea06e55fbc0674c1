"""`python -m aurea_orchestrator` is the command `aurea`."""

from .cli import main

main()
