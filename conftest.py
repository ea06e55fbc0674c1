"""For every test: no setting of the developer's, none of their files, and the notebooks are tests too."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.nbrun import notebooks, run, wiped

REQUIRED = os.environ.get("AUREA_REQUIRE_REDIS", "") not in ("", "0")


def pytest_configure(config: pytest.Config) -> None:
    "Before anything is collected, so that fixtures of every scope and subprocesses start from the same."
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    for name in set(os.environ) - set(wiped(os.environ, "")):
        patch.delenv(name)


@pytest.fixture(scope="session", autouse=True)
def _cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    "What is opened for the whole session never touches the user's cache either."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache-home")))
        yield


@pytest.fixture(autouse=True)
def _clean_room(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    "Each test has an empty working folder (so no `.env`), a cache folder of its own and no setting."
    home = tmp_path_factory.mktemp("room")
    (home / "cwd").mkdir()
    for name in set(os.environ) - set(wiped(os.environ, "")):
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.chdir(home / "cwd")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    "Where redis-server was promised (AUREA_REQUIRE_REDIS=1), a skipped test that is marked `redis` is a failure."
    report = yield
    if item.get_closest_marker("redis"):
        if ("marker", "redis") not in report.user_properties:
            report.user_properties.append(("marker", "redis"))           # for who counts them in the junit file
        if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            report.outcome, report.longrepr = "failed", f"AUREA_REQUIRE_REDIS is set, but this test was skipped: {reason}"
    return report


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return NotebookFile.from_parent(parent, path=file_path) if file_path in notebooks() else None


class NotebookFile(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield NotebookItem.from_parent(self, name="notebook")


class NotebookItem(pytest.Item):
    def runtest(self) -> None:
        pytest.importorskip("execnb", reason="needs the dev extra")
        done = run(self.path, "test")
        if done.returncode:
            raise NotebookError(done.stdout + done.stderr)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return str(excinfo.value) if excinfo.errisinstance(NotebookError) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.path.stem


class NotebookError(Exception):
    "A cell of a notebook raised."
