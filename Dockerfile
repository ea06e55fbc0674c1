# The service as an image:  docker build -t aurea-orchestrator .
# Settings are environment variables (.env.example lists them); so are WEB_CONCURRENCY (worker processes) and HOST, PORT.

FROM python:3.13-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src

# What it needs comes before what it is: a change of code does not install everything again.
# The environment has no pip; it is made where it will be, since its scripts know their path.
COPY settings.ini ./
RUN python -c "from configparser import ConfigParser as C; c = C(delimiters='='); c.read('settings.ini'); print(*c['DEFAULT']['requirements'].split(), sep='\n')" > requirements.txt \
 && python -m venv --without-pip /opt/aurea \
 && pip --python /opt/aurea/bin/python install -r requirements.txt

COPY setup.py pyproject.toml README.md LICENSE ./
COPY aurea_orchestrator/ aurea_orchestrator/
RUN pip wheel --no-deps --wheel-dir dist . \
 && pip --python /opt/aurea/bin/python install dist/*.whl \
 && /opt/aurea/bin/python -c "import aurea_orchestrator.main"


FROM python:3.13-slim
LABEL org.opencontainers.image.title="aurea-orchestrator" \
      org.opencontainers.image.description="A cache for LLM and embedding calls, from one notebook to a fleet of workers" \
      org.opencontainers.image.source="https://github.com/aurea/aurea-orchestrator" \
      org.opencontainers.image.licenses="MIT"

# A user by number, so that Kubernetes (runAsNonRoot) can see that it is not root. Its only folder is the cache's: the SQLite
# file is there when no Redis is configured (keep it with -v aurea-cache:/var/cache/aurea).
RUN groupadd --gid 10001 aurea \
 && useradd --no-log-init --uid 10001 --gid 10001 --home-dir /var/cache/aurea --no-create-home --shell /usr/sbin/nologin aurea \
 && install -d -m 0700 -o aurea -g aurea /var/cache/aurea
COPY --from=build /opt/aurea /opt/aurea
COPY deploy/healthcheck.py /opt/aurea/healthcheck.py
ENV PATH=/opt/aurea/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/var/cache/aurea
# The working folder is on the import path, so it is not writable: mount a function of your own here for LLM_BACKEND=mine:answer.
WORKDIR /app
USER 10001:10001

EXPOSE 8000
# Alive, not ready: while Redis is away the service answers without it, and a restart would not help.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "/opt/aurea/healthcheck.py"]

# SIGTERM stops listening and lets answers in progress finish, for as long as an upstream call may take (LLM_TIMEOUT); give the
# container some more (docker run --stop-timeout 70). The access log is off: a line would hold the query string, so the prompt;
# /metrics counts requests. `exec`: the server, not the shell, gets the signal.
STOPSIGNAL SIGTERM
CMD ["sh", "-c", "exec uvicorn aurea_orchestrator.main:app --host \"${HOST:-0.0.0.0}\" --port \"${PORT:-8000}\" --workers \"${WEB_CONCURRENCY:-1}\" --timeout-graceful-shutdown 60 --no-access-log"]
