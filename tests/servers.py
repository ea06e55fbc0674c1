"""Throw-away Redis servers on free ports: one, one with its replica and Sentinels, a cluster. Nothing here outlives the tests."""
from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

REQUIRED = os.environ.get("AUREA_REQUIRE_REDIS", "") not in ("", "0")


def missing(what: str) -> None:
    "A skip on a laptop, a failure where Redis was promised."
    (pytest.fail if REQUIRED else pytest.skip)(f"{what} is not there")


def free_ports(n: int) -> list[int]:
    "Ports that nobody listens on; all at once, so that they differ."
    sockets = [socket.socket() for _ in range(n)]
    try:
        for s in sockets: s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets: s.close()


def until(true: Callable[[], Any], what: str = "something", seconds: float = 20) -> Any:
    "Wait for something, but not for ever."
    end = time.monotonic() + seconds
    while True:
        try:
            if (value := true()): return value
        except (redis.RedisError, OSError): pass
        if time.monotonic() > end: raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.005)


class Server:
    "One redis-server process."

    def __init__(self, folder: Path, *options: str, port: int = 0, password: str = "", tls: bool = False, sentinel: str = "") -> None:
        if not shutil.which("redis-server"): missing("redis-server")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port, self.password, self.tls = folder, port or free_ports(1)[0], password, tls
        self.socket, self.ca = Path("/tmp") / f"aurea-{self.port}.sock", folder / "ca.crt"  # a socket's path must be short
        if tls: certificate(folder)
        self.command = ["redis-server"]
        if sentinel:
            (folder / "sentinel.conf").write_text(sentinel)
            self.command += [str(folder / "sentinel.conf"), "--sentinel"]
        else:
            self.command += ["--save", "", "--appendonly", "no", "--unixsocket", str(self.socket)]
        self.command += ["--bind", "127.0.0.1", "--dir", str(folder), *options]
        self.command += ["--requirepass", password, "--masterauth", password] if password else []
        self.command += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"] if tls else ["--port", str(self.port)]
        pem = {"cert": self.ca, "key": folder / "ca.key", "ca-cert": self.ca} if tls else {}
        for part, path in pem.items(): self.command += [f"--tls-{part}-file", str(path)]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)
        until(self.answers, f"redis-server on port {self.port}")

    def answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"redis-server ended: {(self.folder / 'log').read_text()[-500:]}")
        with self.client() as client: return bool(client.ping())

    def client(self, **options: Any) -> redis.Redis:
        "A client for the tests to look behind the store's back."
        if self.tls: options |= {"ssl": True, "ssl_ca_certs": str(self.ca), "ssl_check_hostname": False}
        return redis.Redis(port=self.port, password=self.password or None, protocol=2, **options)

    @property
    def url(self) -> str:
        return f"redis{'s' * self.tls}://{f':{self.password}@' if self.password else ''}127.0.0.1:{self.port}/0"

    def pause(self) -> None:
        "As a server that hangs: it takes connections and does not answer."
        assert self.process; self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process; self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None
        self.socket.unlink(missing_ok=True)

    def restart(self) -> None:
        "The same port, but empty, and every connection is dead."
        self.kill(); self.start()


def certificate(folder: Path) -> None:
    "A self-made certificate for this machine."
    if not shutil.which("openssl"): missing("openssl")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", folder / "ca.key", "-out", folder / "ca.crt"],
                   check=True, capture_output=True)


@contextmanager
def standalone(folder: Path, *options: str, **how: Any) -> Iterator[Server]:
    server = Server(folder, *options, **how)
    try: yield server
    finally: server.kill()


class Proxy:
    "A network between a client and a server, that can be slow, or break in the middle of a reply."

    def __init__(self, to: int) -> None:
        self.to, self.delay, self.cut = to, 0.0, False  # Seconds by which replies are late; whether they end after a byte
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._end, self._open = asyncio.get_running_loop(), asyncio.Event(), set[asyncio.StreamWriter]()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._end.wait()
        server.close()
        for writer in self._open: writer.transport.abort()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = {writer}
        self._open |= ends
        try:
            there, here = await asyncio.open_connection("127.0.0.1", self.to)
            ends.add(here)
            self._open.add(here)
            await asyncio.wait([asyncio.create_task(way) for way in (self._carry(reader, here), self._carry(there, writer, True))],
                               return_when=asyncio.FIRST_COMPLETED)
        except OSError: pass
        finally:
            for end in ends: end.transport.abort()
            self._open -= ends

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reply: bool = False) -> None:
        try:
            while data := await reader.read(65536):
                if reply and self.delay: await asyncio.sleep(self.delay)
                writer.write(data[:1] if reply and self.cut else data)
                await writer.drain()
                if reply and self.cut: return
        except OSError: pass

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)


class Sentinels:
    "A primary, its replica, and three Sentinels that watch them under the name `main`."

    def __init__(self, folder: Path) -> None:
        self.servers: list[Server] = []
        try:
            self.primary = self.add(Server(folder / "primary", "--repl-diskless-sync-delay", "0"))
            self.replica = self.add(Server(folder / "replica", "--replicaof", "127.0.0.1", str(self.primary.port)))
            conf = (f"sentinel monitor main 127.0.0.1 {self.primary.port} 2\nsentinel down-after-milliseconds main 500\n"
                    "sentinel failover-timeout main 3000\n")
            self.sentinels = [self.add(Server(folder / f"sentinel-{n}", sentinel=conf)) for n in range(3)]
            for each in self.sentinels: until(lambda each=each: self.ready(each), "Sentinels to know each other")
        except BaseException: self.kill(); raise

    def add(self, server: Server) -> Server:
        self.servers.append(server); return server

    @staticmethod
    def ready(sentinel: Server) -> bool:
        with sentinel.client() as client:
            main = client.sentinel_masters()["main"]
            return main["num-other-sentinels"] == 2 and main["num-slaves"] == 1

    @property
    def url(self) -> str: return f"redis+sentinel://{','.join(f'127.0.0.1:{s.port}' for s in self.sentinels)}/main"

    def kill(self) -> None:
        for server in self.servers: server.kill()


class Cluster:
    "Three primaries with a replica each."

    def __init__(self, folder: Path, replicas: bool = True) -> None:
        self.servers: list[Server] = []
        n = 6 if replicas else 3
        ports = free_ports(2 * n)
        try:
            for port, bus in zip(ports[:n], ports[n:], strict=True):
                options = ("--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-node-timeout", "2000",
                           "--repl-diskless-sync-delay", "0")
                self.servers.append(Server(folder / str(port), *options, port=port))
            with self.servers[0].client() as first:
                for at, (server, bus) in enumerate(zip(self.servers, ports[n:], strict=True)):
                    with server.client() as client:
                        client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", at + 1)
                        if at < 3: client.execute_command("CLUSTER", "ADDSLOTSRANGE", *((0, 5460), (5461, 10922), (10923, 16383))[at])
                    if at: first.execute_command("CLUSTER", "MEET", "127.0.0.1", server.port, bus)
            until(lambda: all(self.nodes(server).count("connected") == n for server in self.servers), "the nodes to meet")
            for primary, server in zip(self.servers, self.servers[3:], strict=False):
                name = words(primary, "CLUSTER", "MYID")
                until(lambda name=name, to=server: words(to, "CLUSTER", "REPLICATE", name), "a replica")
            until(lambda: all(self.whole(server) for server in self.servers), "the cluster")
            for server in self.servers[3:]: until(lambda to=server: "master_link_status:up" in words(to, "INFO", "replication"), "a copy")
        except BaseException: self.kill(); raise

    @staticmethod
    def nodes(server: Server) -> str: return words(server, "CLUSTER", "NODES")

    def whole(self, server: Server) -> bool:
        nodes = self.nodes(server)
        ok = "cluster_state:ok" in words(server, "CLUSTER", "INFO")
        return ok and nodes.count("slave") == len(self.servers) - 3 and "handshake" not in nodes

    @property
    def url(self) -> str: return f"redis+cluster://{','.join(f'127.0.0.1:{s.port}' for s in self.servers[:2])}"

    def kill(self) -> None:
        for server in self.servers: server.kill()


def words(server: Server, *command: str) -> str:
    "What a server answers, as it says it."
    with server.client() as client:
        connection = client.connection_pool.get_connection()
        try:
            connection.send_command(*command)
            return bytes(connection.read_response()).decode()
        finally:
            client.connection_pool.release(connection)
