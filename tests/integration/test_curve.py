"""Engines over tcp://: encrypted, and only those on the list."""

from __future__ import annotations

import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq
from fakes import RecordingBus, free_port, until
from scripted_engine import ScriptedEngine, hello
from typer.testing import CliRunner

from smartspec.daemon import config
from smartspec.daemon.admission import curve_keys
from smartspec.daemon.admission.curve_keys import KeyFileError
from smartspec.daemon.cli import app
from smartspec.daemon.config import ConfigError
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.transport import Server
from smartspec.engine_adapter.curve import EngineKeys, read_keys
from smartspec.engine_adapter.link import EngineLink

pytestmark = pytest.mark.integration
KNOCKS_S = 0.7  #: long enough for a connection that is let in


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    directory = tmp_path / "keys"
    curve_keys.make(directory)
    curve_keys.add(directory, "gpu0")
    return directory


class Pair:
    """A daemon's loop and engines over CURVE, all in this process."""

    def __init__(self, keys: Path, stack: ExitStack) -> None:
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        self.server = Server(self.endpoint, keys=lambda: curve_keys.read(keys))
        settings = config.load(
            env={}, overrides={"endpoint": self.endpoint, "curve.directory": str(keys)}
        )
        self.settings = settings
        self.loop = ControlLoop(settings, self.server, RecordingBus())
        self._stack = stack
        stack.callback(self.loop.close)

    def engine(self, keys: EngineKeys | None, name: str = "gpu0") -> ScriptedEngine:
        import numpy as np

        link = EngineLink(self.endpoint, hello(name), keys=keys)
        self._stack.callback(link.close)
        return ScriptedEngine(link, np.full(4, 0.7))

    def turn(self, engine: ScriptedEngine) -> str:
        engine.step()
        self.loop.cycle(0.002)
        return engine.choices[-1].source

    def steered(self, engine: ScriptedEngine) -> bool:
        """Whether it is steered in the time that this takes others."""
        deadline = time.monotonic() + KNOCKS_S
        while time.monotonic() < deadline:
            if self.turn(engine) in ("policy", "probe"):
                return True
        return False


@pytest.fixture
def pair(keys: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(keys, stack)


def test_engine_on_the_list_is_steered(pair: Pair, keys: Path) -> None:
    engine = pair.engine(read_keys(keys / "gpu0.engine"))
    until(lambda: pair.turn(engine) in ("policy", "probe"))


def test_nobody_else_is_let_in(pair: Pair, keys: Path) -> None:
    mine = read_keys(keys / "gpu0.engine")
    public, secret = zmq.curve_keypair()
    stranger = EngineKeys(mine.server, public, secret)
    assert not pair.steered(pair.engine(stranger))
    assert pair.server.num_denied > 0
    assert not pair.steered(pair.engine(None)), "an engine without keys was let in"
    other, _ = zmq.curve_keypair()
    wrong_daemon = EngineKeys(other, mine.public, mine.secret)
    assert not pair.steered(pair.engine(wrong_daemon)), (
        "an engine spoke to a daemon it does not know"
    )
    pair.loop._next_tidy_at = 0.0
    pair.loop.cycle(0.0)
    assert pair.loop.counters["reports"] == 0


def test_traffic_is_not_readable_on_the_way(keys: Path) -> None:
    """Through a relay that keeps all bytes: neither names nor reasons are among them."""
    with ExitStack() as stack:
        pair = Pair(keys, stack)
        port, target = free_port(), int(pair.endpoint.rpartition(":")[2])
        seen = bytearray()
        listener = socket.create_server(("127.0.0.1", port))
        stack.callback(listener.close)
        first = threading.Thread(target=_relay, args=(listener, target, seen), daemon=True)
        first.start()
        link = EngineLink(
            f"tcp://127.0.0.1:{port}", hello("secret-name"), keys=read_keys(keys / "gpu0.engine")
        )
        stack.callback(link.close)
        import numpy as np

        engine = ScriptedEngine(link, np.full(4, 0.7))
        until(lambda: pair.turn(engine) in ("policy", "probe"))
        assert len(seen) > 500
        for text in (b"secret-name", b"policy", b"running", b"scripted"):
            assert text not in seen


def _relay(listener: socket.socket, target: int, seen: bytearray) -> None:
    try:
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", target))
    except OSError:
        return

    def copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                seen.extend(data)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            sink.close()
            source.close()

    back = threading.Thread(target=copy, args=(far, near), daemon=True)
    back.start()
    copy(near, far)


def test_list_is_read_anew_at_reload(pair: Pair, keys: Path) -> None:
    curve_keys.add(keys, "gpu1")
    late = pair.engine(read_keys(keys / "gpu1.engine"), "gpu1")
    assert not pair.steered(late)
    pair.loop.apply(pair.settings)
    until(lambda: pair.turn(late) in ("policy", "probe"))


def test_engine_keys_are_renewed_while_the_old_ones_still_open(pair: Pair, keys: Path) -> None:
    old = read_keys(keys / "gpu0.engine")
    curve_keys.rotate(keys, "gpu0")
    new = read_keys(keys / "gpu0.engine")
    assert old.secret != new.secret
    pair.loop.apply(pair.settings)
    first = pair.engine(old)
    until(lambda: pair.turn(first) in ("policy", "probe"))
    second = pair.engine(new, "gpu0b")
    until(lambda: pair.turn(second) in ("policy", "probe"))
    curve_keys.drop(keys, "gpu0~")
    pair.loop.apply(pair.settings)
    assert not pair.steered(pair.engine(old, "gpu0c"))


def test_daemon_keys_are_renewed_in_the_files_of_all_engines(keys: Path) -> None:
    curve_keys.add(keys, "gpu1")
    before = {name: read_keys(keys / f"{name}.engine") for name in ("gpu0", "gpu1")}
    assert len(curve_keys.rotate(keys)) == 2
    public = curve_keys.read(keys).public
    for name, old in before.items():
        new = read_keys(keys / f"{name}.engine")
        assert (new.server, new.secret) == (public, old.secret)
        assert new.server != old.server


def test_old_list_stays_when_the_new_one_is_broken(
    pair: Pair, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (keys / curve_keys.ALLOWED).write_text("gpu0 tooshort\n", "ascii")
    pair.loop.apply(pair.settings)
    assert "the list of engines in force stays" in caplog.text
    engine = pair.engine(read_keys(keys / "gpu0.engine"))
    until(lambda: pair.turn(engine) in ("policy", "probe"))


# -- files --


def test_secrets_are_readable_by_their_owner_alone_and_refused_otherwise(keys: Path) -> None:
    for path in (keys / curve_keys.SECRET, keys / "gpu0.engine"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        curve_keys.read(keys)
    with pytest.raises(ValueError, match="chmod 600"):
        read_keys(keys / "gpu0.engine")


def test_secrets_are_never_shown(keys: Path) -> None:
    daemon, engine = curve_keys.read(keys), read_keys(keys / "gpu0.engine")
    shown = CliRunner().invoke(app, ["keys", "show", "-d", str(keys)]).output
    assert daemon.public.decode() in shown and engine.public.decode() in shown
    for secret in (daemon.secret.decode(), engine.secret.decode()):
        for text in (shown, repr(daemon), repr(engine), str(daemon)):
            assert secret not in text
    (keys / curve_keys.SECRET).write_text("x" + daemon.secret.decode(), "ascii")
    with pytest.raises(KeyFileError) as caught:
        curve_keys.read(keys)
    assert daemon.secret.decode() not in str(caught.value)


def test_commands_make_add_rotate_and_drop(tmp_path: Path) -> None:
    directory = str(tmp_path / "k")

    def keys(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["keys", *arguments, "-d", directory])
        assert result.exit_code == code, result.output
        return result.output

    assert "smartspec keys make" in keys("show", code=2)
    keys("make")
    assert "there already" in keys("make", code=2)
    assert "gpu0.engine" in keys("add", "gpu0")
    assert "on the list already" in keys("add", "gpu0", code=2)
    assert "gpu0~" not in keys("show")
    keys("rotate", "gpu0")
    assert "gpu0~" in keys("show")
    keys("drop", "gpu0~")
    assert "gpu0.engine" in keys("rotate")
    assert "letters" in keys("add", "../gpu", code=2)
    assert "not on the list" in keys("drop", "gpu9", code=2)


def test_open_addresses_are_refused_without_keys() -> None:
    for address in ("tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://10.1.2.3:5555"):
        for more in ({}, {"insecure": True}):
            with pytest.raises(ConfigError, match="endpoint"):
                config.load(env={}, overrides={"endpoint": address, **more})
        with_keys = {"endpoint": address, "curve.directory": "/k"}
        assert config.load(env={}, overrides=with_keys).endpoint == address
        with pytest.raises(ConfigError, match="bus_endpoint"):
            config.load(env={}, overrides={"bus_endpoint": address, "curve.directory": "/k"})
    both = {"endpoint": "tcp://0.0.0.0:5555", "curve.directory": "/k", "insecure": True}
    with pytest.raises(ConfigError, match=r"loopback|insecure"):
        config.load(env={}, overrides=both)
