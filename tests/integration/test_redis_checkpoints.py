"""What was learned, in a real Redis: new hosts, hosts that write at the same time, refusals."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis
from learned_state import ENGINE, FRAME, experienced
from servers import eventually, valkey_server

from smartspec.daemon import config
from smartspec.daemon.event_bus import CheckpointEvent, NoteEvent
from smartspec.daemon.state import warm_start
from smartspec.daemon.state.learned import decode, encode
from smartspec.daemon.state.library import Library
from smartspec.daemon.telemetry import redis_store
from smartspec.daemon.telemetry.embedded_valkey import EmbeddedValkey
from smartspec.daemon.telemetry.redis_store import Keys, RedisStore, connect

pytestmark = pytest.mark.integration

KEY = ENGINE.key.id


def new_host(runtime_dir: Path) -> Library:
    """What a daemon knows at its start that shares the Redis, but has no files."""
    overrides = {
        "runtime_dir": str(runtime_dir),
        "redis.url": f"unix://{runtime_dir}/own.sock",
        "state.directory": f"{runtime_dir}/none",
    }
    return warm_start.load(config.load(env={}, overrides=overrides))


def test_new_host_starts_from_redis_when_it_has_no_file(runtime_dir: Path) -> None:
    with valkey_server(runtime_dir / "own.sock"):
        client = connect(f"unix://{runtime_dir}/own.sock")
        store = RedisStore(client, "smartspec:", 100, 60, max_learned=2)
        for at in range(3):
            key_id = f"{at:016x}-{0:08x}"
            store.add(CheckpointEvent(t_s=float(at), key_id=key_id, frame=b"?"))
        store.add(CheckpointEvent(key_id=KEY, frame=FRAME))
        store.flush()
        keys = Keys("smartspec:")
        assert client.zcard(keys.learned) == 2, "the oldest are pruned"
        assert client.ttl(keys.learned_of(KEY)) == -1
        library = new_host(runtime_dir)
        assert (len(library), library.num_refused) == (1, 1)
        assert library.find(ENGINE.key)[0].num_steps == ENGINE.learned.num_steps
        assert client.zcard(keys.learned) == 1
        refused = f"{keys.base}learned-refused:{2:016x}-{0:08x}"
        assert client.get(refused) == b"?", "kept aside"
        client.close()


def test_what_another_host_writes_while_a_checkpoint_is_merged_is_not_lost(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts that keep time with each other would else lose the same one's part every time."""
    with valkey_server(runtime_dir / "own.sock"), ExitStack() as stack:
        client, other = (connect(f"unix://{runtime_dir}/own.sock") for _ in range(2))
        stack.callback(client.close)
        stack.callback(other.close)
        key, newer = (
            Keys("smartspec:").learned_of(KEY),
            encode(experienced(400).learned.checkpoint()),
        )
        others = [FRAME, FRAME, newer]
        client.set(key, others.pop(0))
        merged = redis_store._merged

        def while_another_writes(ours: bytes, theirs: bytes, key_id: str) -> bytes:
            if others:
                other.set(key, others.pop(0))
            return merged(ours, theirs, key_id)

        monkeypatch.setattr(redis_store, "_merged", while_another_writes)
        store = RedisStore(client, "smartspec:", 100, 60)
        store.add(CheckpointEvent(key_id=KEY, frame=FRAME))
        store.flush()
        assert not others
        assert decode(client.get(key), KEY).num_steps == 400

        others = [newer] * (redis_store.MAX_RACES + 1)
        store.add(CheckpointEvent(key_id=KEY, frame=encode(experienced(500).learned.checkpoint())))
        store.flush()
        assert len(others) == 1 and decode(client.get(key), KEY).num_steps == 400, "gives way"
        others.clear()
        store.flush()
        assert decode(client.get(key), KEY).num_steps == 500, "and comes again"


def test_redis_is_written_again_when_it_hung_while_a_checkpoint_was_merged(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection that was watching is given back, although the server does not answer."""
    with valkey_server(runtime_dir / "own.sock"), ExitStack() as stack:
        client = connect(f"unix://{runtime_dir}/own.sock", timeout_s=0.3)
        stack.callback(client.close)
        pid = client.info("server")["process_id"]
        client.set(Keys("smartspec:").learned_of(KEY), FRAME)
        merged = redis_store._merged

        def while_it_stops(ours: bytes, theirs: bytes, key_id: str) -> bytes:
            os.kill(pid, signal.SIGSTOP)
            stack.callback(os.kill, pid, signal.SIGCONT)
            return merged(ours, theirs, key_id)

        monkeypatch.setattr(redis_store, "_merged", while_it_stops)
        store = RedisStore(client, "smartspec:", 100, 60)
        store.add(NoteEvent(kind="slower", level="info", text="once"))
        store.add(CheckpointEvent(key_id=KEY, frame=encode(experienced(400).learned.checkpoint())))
        with pytest.raises(redis.RedisError):
            store.flush()
        store._failed(redis.RedisError())
        os.kill(pid, signal.SIGCONT)
        monkeypatch.setattr(redis_store, "_merged", merged)
        eventually(client.ping)
        for _ in range(3):
            store.flush()
        assert store.up and store.num_buffered == 0
        assert client.xlen("smartspec:v1:events") == store.num_written == 1
        assert decode(client.get(Keys("smartspec:").learned_of(KEY)), KEY).num_steps == 400


def test_events_are_written_once_when_what_was_learned_is_refused(runtime_dir: Path) -> None:
    with valkey_server(runtime_dir / "own.sock"):
        client = connect(f"unix://{runtime_dir}/own.sock")
        client.set(Keys("smartspec:").learned, "of another type")
        store = RedisStore(client, "smartspec:", 100, 60)
        for text in ("first", "second"):
            store.add(NoteEvent(kind="slower", level="info", text=text))
            store.add(CheckpointEvent(key_id=KEY, frame=FRAME))
            store.flush()
        assert store.up and client.xlen("smartspec:v1:events") == store.num_written == 2
        assert (store.num_failures, store.num_lost) == (2, 0)
        client.close()


def test_checkpoint_reaches_redis_when_it_was_away(runtime_dir: Path) -> None:
    server = EmbeddedValkey(runtime_dir / "own.sock")
    client = connect(f"unix://{runtime_dir}/own.sock", timeout_s=0.5)
    store = RedisStore(client, "smartspec:", 100, 60)
    store.add(CheckpointEvent(key_id=KEY, frame=FRAME))
    with pytest.raises(redis.RedisError):
        store.flush()
    assert len(new_host(runtime_dir)) == 0, "and a start without it is cold, not late"
    server.ensure()
    try:
        store.flush()
        assert len(new_host(runtime_dir)) == 1
    finally:
        client.close()
        server.close()
