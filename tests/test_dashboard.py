"""The dashboard: what it is told, who is told, and what a real browser makes of it."""
from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import threading
from contextlib import closing, contextmanager
from types import SimpleNamespace

import msgspec
import pytest

from aurea_orchestrator import Cache, cached, dashboard
from aurea_orchestrator.counts import summary
from aurea_orchestrator.metrics import Metrics
from aurea_orchestrator.watching import OUTCOMES, SPAN, Growth, History, picture, quantile
from tests.browser import Page
from tests.servers import until
from tests.service import Service

KEY = "sésame-1234".encode().hex()
BOUNDS = (0.001, 0.01, 0.1)


def stats(up=True, **calls): return {**summary({f"llm:{outcome}": n for outcome, n in calls.items()}), "store": {"name": "redis", "url": "redis://here", "up": up}}


def counted(**calls): return {("cache_outcomes_total", "llm", outcome): [float(n)] for outcome, n in calls.items()}


# What a page is told

def test_every_call_is_shown_once_whatever_happens_to_the_store():
    import random
    for seed in range(200):
        chance, growth, total, told, shown, up = random.Random(seed), Growth(), 0, 0, 0, True
        growth.new([0] * 7, [0] * 7)
        for _ in range(60):
            up = chance.random() < (0.8 if up else 0.3)
            total += chance.randrange(5)
            if up: told = chance.randint(told, total)  # Counts come late
            shown += growth.new([told, *[0] * 6] if up else None, [total, *[0] * 6])[0]
            assert shown <= total
        shown += growth.new([total, *[0] * 6], [total, *[0] * 6])[0]
        assert shown == total


def test_calls_of_others_are_shown_too_and_a_store_that_was_emptied_begins_again():
    history = History()
    for now, hits in ((0, 50), (10, 53), (20, 2), (30, 4)): history.see(1000 + now, stats(hit=hits), {})
    assert [row[2] for row in picture(history, 1031, BOUNDS, {})["time"]["columns"]] == [0, 3, 2, 2]


def test_an_hour_is_bounded_and_keeps_its_sums():
    history, total = History(), 0
    for second in range(0, 3 * 3600, 5):
        total += second % 7
        history.see(10_000.0 + second, stats(hit=total), counted(hit=total))
        seen = picture(history, 10_000.0 + second, BOUNDS, {})["time"]
        assert len(seen["columns"]) <= 60 and seen["until"] - seen["from"] == 60 * seen["width"] and seen["from"] < 10_000 + second < seen["until"]
        if second < SPAN - 120: assert sum(row[2] for row in seen["columns"]) == total - 0, second  # Nothing is lost while columns widen
    assert len(history.columns) == 360 and len(history.minutes) == 60
    hour = sum(second % 7 for second in range(3 * 3600 - 3600, 3 * 3600, 5))
    assert abs(sum(row[2] for row in seen["columns"]) - hour) < 100  # A minute at its edge


def test_totals_stay_while_the_store_is_away():
    history = History()
    history.see(100, stats(hit=7, miss=3), counted(miss=3))
    history.see(111, stats(up=False, hit=1), counted(miss=4))
    history.see(125, stats(up=False, hit=1), counted(miss=4))
    seen = picture(history, 126, BOUNDS, {})
    assert seen["total"]["requests"] == 10 and seen["as_of"] == 100 and seen["store"]["down_since"] == 111 and seen["store"]["up"] is False
    assert [(row[1], row[2 + OUTCOMES.index("miss")]) for row in seen["time"]["columns"]] == [(True, 0), (False, 1), (False, 0)]
    history.see(131, stats(hit=7, miss=4), counted(miss=4))
    assert picture(history, 132, BOUNDS, {})["store"]["down_since"] is None


def test_percentiles_are_those_of_the_time_that_is_remembered():
    def steps(*counts): return {("cache_step_duration_seconds", kind, "compute"): [1.0, *counts] for kind in ("llm", "embedding")}
    history = History()
    history.see(0, stats(), steps(1000, 0, 0, 0))
    history.see(10, stats(), steps(1000, 0, 8, 0))
    [row] = picture(history, 11, BOUNDS, {})["steps"]
    assert row["calls"] == 16 and row["step"] == "compute" and 0.01 < row["p50"] < row["p95"] < row["p99"] <= 0.1
    assert quantile([1, 0, 0, 0], BOUNDS, 0.99) <= 0.001 and quantile([0, 0, 0, 5], BOUNDS, 0.5) == 0.1


def test_a_picture_stays_small():
    totals = {f"@calls:llm:hit:function_{n}": n for n in range(3000)}
    history = History()
    history.see(0, {**summary(totals), "store": {"up": True}}, {})
    seen = picture(history, 1, BOUNDS, {f"llm:{n:064x}": n for n in range(500)})
    assert len(json.dumps(seen)) < 20_000 and seen["functions"][0]["name"] == "function_2999" and seen["functions_in_all"] == 3000
    assert [row["hits"] for row in seen["hottest"]] == list(range(499, 489, -1))


# Who looks, and how often

@pytest.fixture
async def watched(monkeypatch):
    "A watcher of a cache in memory, and how often it looked."
    monkeypatch.setattr(dashboard, "SECOND", 0.02)
    cache, metrics, looks = Cache.from_url("memory://"), Metrics("0"), []
    watcher = dashboard.Watcher()
    astats = cache.astats
    async def counting(): looks.append(1); return await astats()
    house = SimpleNamespace(cache=SimpleNamespace(store=cache.store, astats=counting, clock=cache.clock), metrics=metrics)
    yield watcher, house, looks
    await watcher.stop()
    cache.close()


async def test_a_store_is_asked_seldom_unless_somebody_looks(watched):
    watcher, house, looks = watched
    watcher.start(house)
    await asyncio.sleep(0.3)
    assert len(looks) == 1
    watcher.listeners = 1
    await watcher.next(hurry=True)
    while len(looks) < 5: await asyncio.sleep(0.01)
    watcher.listeners = 0
    await asyncio.sleep(0.1)
    before = len(looks)
    await asyncio.sleep(0.3)
    assert len(looks) <= before + 1


async def test_one_look_serves_all(watched):
    watcher, house, looks = watched
    watcher.start(house)
    watcher.listeners = 20
    streams = [dashboard.frames(watcher) for _ in range(20)]
    first = await asyncio.gather(*(anext(stream) for stream in streams))
    assert len(set(first)) == 1 and first[0].startswith(b"event: picture\nid: 1\ndata: {") and first[0].endswith(b"}\n\n") and len(looks) <= 4


async def test_a_look_that_fails_is_logged_and_the_last_picture_stays(watched, caplog):
    watcher, house, looks = watched
    watcher.start(house)
    await watcher.next()
    before = watcher.picture
    async def broken(): raise ValueError("no")
    house.cache.astats = broken
    with caplog.at_level(logging.ERROR): await watcher.next(hurry=True)
    assert "its last picture stays" in caplog.text and watcher.picture is before and watcher.looking


async def test_a_stream_ends_with_its_watcher_and_after_its_time(watched, monkeypatch):
    watcher, house, _ = watched
    watcher.start(house)
    stream = dashboard.frames(watcher)
    await anext(stream)
    waiting = asyncio.create_task(anext(stream, None))
    await asyncio.sleep(0)
    await watcher.stop()
    assert await asyncio.wait_for(waiting, 10) is None
    watcher.start(house)
    watcher.listeners = 1
    monkeypatch.setattr(dashboard, "LIFE", 0.1)
    assert await asyncio.wait_for(anext(dashboard.frames(watcher)), 10)
    async def heard(): return [frame async for frame in dashboard.frames(watcher)]
    assert len(await asyncio.wait_for(heard(), 10)) >= 1


# Over HTTP

@contextmanager
def listening(service, path="/dashboard/events", key=KEY):
    "The frames of a stream, as they come."
    with service.client() as client, client.stream("GET", path, headers={"X-API-Key": key} if key else {}) as reply:
        def pictures():
            text = ""
            for piece in reply.iter_text():
                *whole, text = (text + piece).split("\n\n")
                for frame in whole:
                    lines = dict(line.split(": ", 1) for line in frame.split("\n") if not line.startswith(":"))
                    if lines: yield msgspec.json.decode(lines["data"])
        yield reply, pictures()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboard")
    (folder / "few.py").write_text("from aurea_orchestrator import dashboard\ndashboard.MOST = 2\nfrom aurea_orchestrator.main import app\n")
    with Service(folder, app="few:app", CACHE_URL="memory://", API_KEY=KEY) as service: yield service


def test_the_page_is_one_document_that_asks_nobody_else(service):
    with service.client() as client: reply = client.get("/dashboard")
    page, policy = reply.text, reply.headers["content-security-policy"]
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
    for tag in ("script", "style"):
        [inner] = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert set(re.findall(r"\w+://[^\s\"'`)]+", page)) == {"http://www.w3.org/2000/svg"} and "//cdn" not in page
    assert not re.search(r"<[^>]+\s(style|on\w+)=", page) and "innerHTML" not in page and KEY not in page
    assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("key", [None, "", "wrong", KEY.upper() + "x"])
def test_pictures_are_for_those_who_have_the_key(service, key):
    with listening(service, key=key) as (reply, _):
        assert reply.status_code == 401 and "X-API-Key" in reply.read().decode()
    with service.client() as client: assert client.get(f"/dashboard/events?key={KEY}&X-API-Key={KEY}").status_code == 401


def test_a_picture_at_once_and_another_after_something_was_asked(service):
    with listening(service) as (reply, pictures), service.client() as client:
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream") and reply.headers["cache-control"] == "no-store"
        first = next(pictures)
        prompt = {"prompt": "why?", "n": first["total"]["requests"]}
        assert [client.post("/llm/generate", json=prompt).headers["x-cache"] for _ in range(3)] == ["miss", "hit", "hit"]
        asked = next(seen for seen in pictures if seen["total"]["requests"] >= first["total"]["requests"] + 3)
        assert asked["total"]["hits"] == first["total"]["hits"] + 2 and asked["store"]["up"] and asked["functions"][0]["name"] == "/llm/generate"
        assert {"lookup", "compute", "store"} <= {row["step"] for row in asked["steps"]}
        columns = asked["time"]["columns"]
        assert sum(sum(row[2:]) for row in columns) >= 3 and "why?" not in json.dumps(asked) and KEY not in json.dumps(asked)
        assert client.get("/cache/stats", headers={"X-API-Key": KEY}).json()["total"] == asked["total"]
    assert KEY not in service.log


def test_seats_are_bounded_and_given_back(service):
    until(lambda: _seats(service) == 2, "seats to be free")
    with listening(service) as (one, first), listening(service) as (two, second):
        assert next(first)["store"] and next(second)["store"] and one.status_code == two.status_code == 200
        with listening(service) as (third, _):
            assert third.status_code == 503 and third.headers["retry-after"] == "10" and "try again" in third.read().decode()
    until(lambda: _seats(service) == 2, "those who left to be noticed")


def _seats(service):
    with listening(service) as (one, _), listening(service) as (two, _): return [one.status_code, two.status_code].count(200)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_stops_though_somebody_looks(tmp_path, workers):
    service = Service(tmp_path, workers=workers, CACHE_URL=f"sqlite:///{tmp_path}/c.db")
    with service, listening(service, key=None) as (_, pictures):
        next(pictures)
        heard, listener = [], threading.Thread(target=lambda: heard.extend(pictures))
        listener.start()
        service.stop()
        listener.join(20)
        assert not listener.is_alive() and service.log.count("Application shutdown complete") == workers and "Traceback" not in service.log
        assert service.process.returncode != -9


@pytest.mark.slow
def test_mounted_in_another_app_which_never_started_it(tmp_path):
    (tmp_path / "host.py").write_text(
        "from fastapi import FastAPI\nfrom aurea_orchestrator.main import create_app\n"
        "app = FastAPI()\napp.mount('/ai', create_app())\n")
    service = Service(tmp_path, app="host:app", CACHE_URL="memory://", API_KEY=KEY)
    service.__class__ = type("Hosted", (Service,), {"_started": lambda self: self.log.count("startup complete") == 1})
    with service, service.client() as client:
        assert client.get("/ai/dashboard").status_code == 200 and client.get("/ai/dashboard/events").status_code == 401
        with listening(service, "/ai/dashboard/events") as (_, pictures): assert next(pictures)["store"]["name"] == "memory"
        with listening(service, "/ai/dashboard/events") as (_, pictures):
            next(pictures)
            service.stop()
        assert service.process.returncode != -9 and "Traceback" not in service.log



# In a browser

def names(page): return [one["request"]["url"] for one in page.events("Network.requestWillBeSent")]


def open_with(page, key):
    page.until("!document.querySelector('#door').hidden")
    page.js(f"document.querySelector('#key').value = {key!r}; document.querySelector('#door').requestSubmit()")


@pytest.mark.redis
@pytest.mark.slow
def test_a_browser_shows_it_all(tmp_path, own_redis):
    hostile = "<img src=x onerror=document.title='owned'>"
    with Service(tmp_path, CACHE_URL=own_redis.url, API_KEY=KEY) as service, service.client() as client, Page(tmp_path / "browser") as page:
        def ask(*prompts): return [client.post("/llm/generate", json={"prompt": one}).headers["x-cache"] for one in prompts]
        def tile(n): return page.text(f"#tiles > div:nth-child({n})")

        # It asks for the key, and refuses a wrong one
        page.go(f"{service.url}/dashboard")
        open_with(page, "wrong")
        page.until("document.querySelector('#wrong').textContent.includes('does not open')")
        assert page.js("document.querySelector('#all').hidden") and page.js("document.activeElement.id") == "key"
        open_with(page, KEY)
        page.until("!document.querySelector('#all').hidden")
        assert "Nothing was asked yet" in page.text("#empty") and f"{service.url}/llm/generate" in page.text("#empty")
        page.until("document.querySelector('#live').className === 'on'")

        # It follows what is asked, here and elsewhere
        assert ask("a", "b", "a", "a") == ["miss", "miss", "hit", "hit"]
        page.until("document.querySelector('#tiles b').textContent === '50.00 %'")
        assert page.js("document.querySelector('#empty').hidden") and "2 of 4 lookups" in tile(1)
        with closing(Cache.from_url(own_redis.url)) as cache:
            def ask_elsewhere(x): return {"choices": x, "model": "gpt-4o-mini", "usage": {"prompt_tokens": 1000, "completion_tokens": 500}}
            ask_elsewhere.__qualname__ = hostile
            elsewhere = cached("llm", cache=cache)(ask_elsewhere)
            for _ in range(3): elsewhere("x")
        page.until("document.querySelector('#tiles b').textContent === '57.14 %'")
        assert "3,000" in tile(3) and "1,500 spent" in tile(3)
        assert hostile in page.text("#functions") and page.js("document.images.length") == 0 and page.js("document.title") == "Aurea"
        assert "compute" in page.text("#steps") and "hit rate" in page.text("#outcomes") and "redis" in page.text("#store")
        assert len(page.js("document.querySelector('#hottest tbody th').textContent")) == 12
        page.js("document.querySelector('summary').click()")
        assert sum(int(n) for n in page.js("[...document.querySelectorAll('#rows tbody tr')].map(row => row.cells[1].textContent)")) == 4
        for name in ("Over time: 7 lookups, 57.14 % of them hits", "llm: 57.14 % hits", "compute: half within"):
            assert page.js(f"[...document.querySelectorAll('svg[role=img]')].some(one => one.getAttribute('aria-label').startsWith({name!r}))"), name

        # It clears, if that is meant
        page.js("document.querySelector('#clear').click()")
        assert page.js("document.activeElement.textContent") == "Keep them"
        page.js("document.activeElement.click()")
        assert ask("a") == ["hit"] and page.text("#said") == ""
        page.js("document.querySelector('#clear').click(); document.querySelector('#ask button[value=clear]').click()")
        page.until("document.querySelector('#said').textContent.includes('3 entries were removed')")
        assert ask("a", "a") == ["miss", "hit"]

        # It shows that Redis goes down and comes back
        page.until("document.querySelector('#tiles').textContent.includes('6 of 10')")
        shown = "[...document.querySelectorAll('#rows tbody tr')].flatMap(row => [...row.cells].slice(1, -2)).reduce((n, cell) => n + +cell.textContent, 0)"
        for harm, mend in ((own_redis.pause, own_redis.resume), (own_redis.kill, own_redis.start)):
            was, drawn = tile(1), page.js(shown)
            harm()
            page.until("!document.querySelector('#trouble').hidden")
            assert ask(f"asked in vain after {harm.__name__}") == ["miss"]
            page.until(f"{shown} === {drawn + 1}")
            assert re.search(r"The store is down since \d\d:\d\d:\d\d\..+", page.text("#trouble")) and "as of" in page.text("#trouble") and tile(1) == was
            assert page.text("#said") == "" and page.js("document.querySelector('#chart .down') !== null") and "down" in page.text("#store")
            assert page.js("[...document.querySelectorAll('#rows tbody tr')].some(row => row.lastChild.textContent === 'down')")
            mend()
            page.until("document.querySelector('#trouble').hidden && document.querySelector('#said').textContent === 'The store is back.'")
            assert page.js(shown) == drawn + 1  # Though the store has been told of it now, or has lost everything

        # It says that the server is gone, tries again, and goes on
        before = service.port
        client.close()
        service.stop()
        page.until("document.querySelector('#live').textContent.includes('next try in')")
        assert "Not connected" in page.text("#said") and page.js("document.body.className") == "off"
        with service:
            page.until("!document.querySelector('#again').hidden || document.querySelector('#live').className === 'on'")
            page.js("document.querySelector('#again').click()")
            page.until("document.querySelector('#live').className === 'on' && document.body.className === ''")
            assert page.text("#said") == "Connected again." and service.port == before

            # It fits a phone, and the dark
            light = page.js("getComputedStyle(document.body).backgroundColor")
            page.look(390, 844, "dark")
            page.until("document.querySelector('#chart svg').getBoundingClientRect().width < 390")
            assert page.js("document.documentElement.scrollWidth") <= 390 and page.js("getComputedStyle(document.body).backgroundColor") != light
        assert all(url.startswith((service.url, "data:")) and KEY not in url for url in names(page)) and KEY not in service.log
        assert not page.events("Runtime.exceptionThrown") and page.js("localStorage.length") == 0 and page.js("document.cookie") == ""
        refused = [one["entry"]["text"] for one in page.events("Log.entryAdded") if "Content Security" in one["entry"]["text"]]
        assert not refused, refused
