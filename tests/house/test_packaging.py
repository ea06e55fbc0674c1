"""What is built and shipped: all modules, their types, the licence, and metadata that needs no apology."""
from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PKG = ROOT / "aurea_orchestrator"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The sdist, the wheel made from that sdist, and in `modules` what both should have."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(PKG, source / PKG.name, ignore=shutil.ignore_patterns("__pycache__"))
    (out / "modules").write_text("\n".join(p.relative_to(source).as_posix() for p in source.rglob("*.py")))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", ".env.example"):
        if (ROOT / name).exists(): shutil.copy(ROOT / name, source)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "eprecat" in line or "Unknown distribution option" in line]
    assert said == []
    return out


def modules(built: Path) -> set[str]: return set((built / "modules").read_text().splitlines())


@pytest.fixture(scope="module")
def metadata(built: Path) -> Message:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        return Parser().parsestr(wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))).decode())


def test_the_wheel_has_every_module_and_nothing_foreign(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {n for n in names if ".dist-info/" not in n} == modules(built) | {"aurea_orchestrator/py.typed"}
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)


def test_the_sdist_can_be_built_from_alone(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {n.partition("/")[2] for n in sdist.getnames()}
    assert modules(built) | {"aurea_orchestrator/py.typed", "LICENSE", "README.md", "settings.ini", "setup.py", "pyproject.toml"} <= names


def test_the_metadata_is_modern_and_complete(metadata):
    assert (metadata["Name"], metadata["License-Expression"], metadata["Requires-Python"]) == ("aurea-orchestrator", "MIT", ">=3.11")
    assert metadata["License"] is None and not [c for c in metadata.get_all("Classifier") if c.startswith("License ::")]
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Description-Content-Type"] == "text/markdown" and metadata.get_payload().startswith("# ")


def test_links_of_the_description_lead_from_anywhere(metadata):
    urls = re.findall(r"\]\(([^)]+)\)", metadata.get_payload())
    assert len(urls) > 10 and [url for url in urls if not url.startswith("https://")] == []


def test_running_needs_nothing_of_the_development_tools(metadata):
    needed = " ".join(r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r)
    tools = ("nbdev", "fastcore", "execnb", "pytest", "sphinx", "openai", "numpy")
    assert "msgspec" in needed and not [tool for tool in tools if tool in needed]


ASK = """
import sys
sys.path.insert(0, sys.argv[1])
import importlib.metadata, aurea_orchestrator as aurea
dist = importlib.metadata.distribution("aurea-orchestrator")
print(aurea.__file__, aurea.__version__ == dist.version, *[e.value for e in dist.entry_points if e.group == "console_scripts"])
"""


def test_the_sdist_installs(built, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", tmp_path]
    subprocess.run([*pip, next(built.glob("*.tar.gz"))], check=True, capture_output=True, text=True)
    said = subprocess.run([sys.executable, "-c", ASK, tmp_path], cwd=tmp_path, text=True, capture_output=True, check=True).stdout.split()
    assert said[0].startswith(str(tmp_path)) and said[1:] == ["True", "aurea_orchestrator.cli:main"]
