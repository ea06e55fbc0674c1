"""Aurea: a cache for LLM and embedding calls, from one notebook to a fleet of workers.

    request → key → lookup → lease → compute → store → reply

Where each word lives, from the ground up:

    errors, config, events      every way to fail, every setting, what is told
    effects                     flows that are written once, for `def` and `async def`
    address, gather, sides      what a networked store needs: URLs, batches, a client a loop
    files, news                 what a store in a file needs: threads, forks, versions, ears
    shapes, forms, call, keys   **key**: any call in canonical form, and its SHA-256
    facts                       what an entry remembers of its call
    records, values, codec      values to bytes and back, never pickle
    stores.*                    **lookup**, **store**: Redis, SQLite, memory, behind one contract
    flight, leases, streams     **lease**: one computation per key, shared by all who ask
    backends.*                  **compute**: the demo, any OpenAI-compatible server, your function
    admission, counts           what is worth storing; how calls ended, exactly
    calling, request, steps,
    replay                      the nouns and verbs of the sentence
    cache                       the sentence itself
    options, decorators         the sentence around a function
    costs, explain, sheets,
    display, rich_display       what it cost and saved; why a miss; shown in notebooks and terminals
    readable, entries,
    cassettes                   entries for people: listed, chosen, as text to review in git
    pacing, plans, runs         many calls at once: a pace, retries, a bar; what stopped goes on
    headers, asked, openapi,
    ledger                      bytes to key, headers; numbers of all workers
    drawing, watching, page     an hour of numbers, and the page that draws them
    metrics, auth, routes,
    dashboard, front, main      **request**, **reply**: the ASGI app
    origins, terminal, doctor,
    looking, warming            what the command is made of: settings' origins, diagnosis, listings, files of prompts
    cli, notebook               the command `aurea`; magics
    contract, sharing, testing  suites for stores and backends of your own

Importing this package opens no socket, starts no thread and reads no setting.
"""

import typing as _typing

from .cache import Cache, get_cache, use_cache
from .decorators import cache_embedding, cache_llm_response, cached

if _typing.TYPE_CHECKING:
    from .config import Settings

__version__ = "0.1.0"
__all__ = ["Cache", "Settings", "cache_embedding", "cache_llm_response", "cached", "get_cache", "load_ipython_extension", "use_cache"]


def __getattr__(name: str) -> object:
    if name == "Settings":  # It brings pydantic along, which a hit does not need
        from .config import Settings
        return Settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "Settings"])


def load_ipython_extension(shell: _typing.Any) -> None:
    "`%load_ext aurea_orchestrator`: the magics of `notebook`."
    from .notebook import load
    load(shell)
