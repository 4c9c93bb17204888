"""The telemetry process against a real event bus and a real Valkey, well and unwell."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from fakes import free_port
from prometheus_client import generate_latest
from servers import eventually, valkey_server

from smartspec.daemon import config
from smartspec.daemon.event_bus import (
    BusEvent,
    DecisionEvent,
    EngineEvent,
    EventBus,
    GainEvent,
    LoopEvent,
    NoteEvent,
    StepEvent,
)
from smartspec.daemon.telemetry import embedded_valkey, metric_ids, redis_store
from smartspec.daemon.telemetry.embedded_valkey import EmbeddedValkey
from smartspec.daemon.telemetry.engine_state import EngineState
from smartspec.daemon.telemetry.process import MAX_EVENTS_PER_TURN, TURN_S, Telemetry
from smartspec.daemon.telemetry.prometheus import PrometheusExporter
from smartspec.daemon.telemetry.redis_store import Keys, RedisStore, connect
from smartspec.daemon.views import inspect

pytestmark = pytest.mark.integration

DOCS = Path(__file__).parents[2] / "docs" / "redis.md"
REASON = "12 running: drafting 3 deep pays, 4 does not"


@contextlib.contextmanager
def telemetry_process(runtime_dir: Path, *settings: str) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [f"--set={s}" for s in settings]
    process = subprocess.Popen(
        [sys.executable, "-m", "smartspec.daemon.cli", "telemetry"]
        + ["--runtime-dir", str(runtime_dir), *arguments],
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            if process.poll() is None:
                process.communicate(timeout=15)
        finally:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()


def step(seq: int, engine: str = "worker-0", **changes: Any) -> StepEvent:
    values: dict[str, Any] = {
        "num_running": 12,
        "num_waiting": 3,
        "kv_usage": 0.4,
        "step_s": 0.05,
        "num_drafted": 36,
        "num_accepted": 20,
        "num_emitted": 32,
        "source": "policy",
        "staleness_steps": 1,
        "predicted_step_s": 0.055,
    }
    return StepEvent(engine=engine, seq=seq, **{**values, **changes})


def decision(seq: int, engine: str = "worker-0") -> DecisionEvent:
    return DecisionEvent(
        engine=engine,
        policy_seq=seq,
        report_seq=seq,
        steering=True,
        reason=REASON,
        value_of_time=640.0,
        depth=3,
        length_counts=(2, 0, 0, 10),
        predicted_goodput=640.0,
        predicted_goodput_none=400.0,
        predicted_goodput_static=600.0,
        acceptance=(0.8, 0.7, 0.6),
        num_probes=1,
        decide_s=0.0008,
        learn_s=0.001,
        num_targets=5,
        num_targets_out_of_reach=2,
    )


def gain(engine: str = "worker-0") -> GainEvent:
    return GainEvent(
        engine=engine,
        stance="control",
        arm="smartspec",
        gain_over_none=0.6,
        gain_over_none_low=0.5,
        gain_over_none_high=0.7,
        measured_over_static=0.04,
        measured_over_static_low=0.01,
        measured_over_static_high=0.07,
        num_compared_static=12,
    )


def play(bus: EventBus, first: int, count: int) -> None:
    for seq in range(first, first + count):
        bus.publish(step(seq))
        bus.publish(gain())
        bus.publish(decision(seq))
        time.sleep(0.001)


@pytest.fixture
def bus(runtime_dir: Path) -> Iterator[EventBus]:
    bus = EventBus.bind(f"ipc://{runtime_dir}/bus.sock")
    yield bus
    bus.close()


def connected(bus: EventBus, runtime_dir: Path, url: str | None = None) -> redis.Redis:
    """A client, once the process reads the bus and writes Redis."""
    client = connect(url or f"unix://{runtime_dir}/valkey.sock")

    def alive() -> Any:
        bus.publish(LoopEvent(num_engines=1, counters={"reports": 7}))
        return client.hget("smartspec:v1:daemon", "num_engines")

    eventually(alive)
    return client


def test_state_and_streams_are_written_when_events_are_published(
    runtime_dir: Path, bus: EventBus
) -> None:
    with telemetry_process(runtime_dir, "telemetry.prometheus_port=0") as process:
        client = connected(bus, runtime_dir)
        bus.publish(
            EngineEvent(
                engine="worker-0",
                epoch=5,
                state="connected",
                fingerprint={"target": "smollm2"},
                limits={"max_length": 5},
            )
        )
        bus.publish(NoteEvent(engine="worker-0", kind="gap", text="2 reports missed"))
        play(bus, 1, 40)
        eventually(lambda: client.hget("smartspec:v1:engine:worker-0", "policy_seq") == b"40")
        state = client.hgetall("smartspec:v1:engine:worker-0")
        assert state[b"reason"].decode() == REASON
        assert json.loads(state[b"length_counts"]) == [2, 0, 0, 10]
        assert float(state[b"goodput"]) == pytest.approx(32 / 0.05)
        assert float(state[b"prediction_error"]) == pytest.approx(0.1)
        assert float(state[b"gain_over_none"]) == pytest.approx(0.6)
        assert int(state[b"num_emitted"]) == 40 * 32
        assert client.smembers("smartspec:v1:engines") == {b"worker-0"}
        for name in ("steps:worker-0", "decisions:worker-0"):
            entries = client.xrange(f"smartspec:v1:{name}")
            assert len(entries) == 40
        assert [f[b"seq"] for _, f in client.xrange("smartspec:v1:steps:worker-0")] == [
            str(i).encode() for i in range(1, 41)
        ]
        kinds = [f[b"type"] for _, f in client.xrange("smartspec:v1:events")]
        assert kinds == [b"engine", b"note"]
        for key in client.keys("smartspec:*"):
            assert 0 < client.ttl(key) <= 86_400
        client.close()
        server = next(p for p in psutil.Process(process.pid).children())
        listening = [c for c in server.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert not listening, "the embedded server must not have a TCP port"
    assert not server.is_running(), "the embedded server outlived the process that started it"


def test_inspect_shows_state_and_reason_when_engine_reports(
    runtime_dir: Path, bus: EventBus, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config.load(env={}, overrides={"runtime_dir": str(runtime_dir)})
    assert inspect.run(settings) == inspect.EXIT_NO_REDIS
    assert "smartspec run" in capsys.readouterr().err
    with telemetry_process(runtime_dir, "telemetry.prometheus_port=0"):
        client = connected(bus, runtime_dir)
        assert inspect.run(settings) == inspect.EXIT_NO_ENGINE
        assert settings.endpoint in capsys.readouterr().err
        bus.publish(NoteEvent(engine="worker-0", kind="drift", text="steps became slower"))
        play(bus, 1, 5)
        eventually(lambda: client.hget("smartspec:v1:engine:worker-0", "policy_seq") == b"5")
        client.close()
        assert inspect.run(settings, as_json=True) == 0
        [shown] = json.loads(capsys.readouterr().out)["engines"]
        own = {"age_s", "daemon_age_s", "events"}
        assert set(shown) == own | set(EngineState.__struct_fields__)
        assert (shown["reason"], shown["length_counts"]) == (REASON, [2, 0, 0, 10])
        assert shown["events"][0]["text"] == "steps became slower"
        assert inspect.run(settings, "worker-0") == 0
        text = " ".join(capsys.readouterr().out.replace("│", "").split())
        for part in (
            *("steering", REASON, "2 requests at 0, 10 at 3"),
            "+60% (+50% to +70%) over no speculation",
            "+4% (+1% to +7%) in 12 comparisons over the engine's own setting",
            *("1: 80%", "640.0 tokens/s measured", "steps became slower"),
            "5 requests ask for a time per token, 2 of them out of reach",
        ):
            assert part in text
        later = time.time() + 60
        assert inspect.run(settings, wall=lambda: later) == 0
        assert "the daemon is silent" in capsys.readouterr().out
        assert inspect.run(settings, "worker-9") == inspect.EXIT_NO_ENGINE
        assert "known: worker-0" in capsys.readouterr().err


def test_writing_resumes_and_nothing_is_doubled_when_redis_is_killed(
    runtime_dir: Path, bus: EventBus
) -> None:
    with contextlib.ExitStack() as stack:
        path = runtime_dir / "own.sock"
        server = stack.enter_context(valkey_server(path))
        process = stack.enter_context(
            telemetry_process(
                runtime_dir, f"redis.url=unix://{path}", "telemetry.prometheus_port=0"
            )
        )
        client = connected(bus, runtime_dir, f"unix://{path}")
        play(bus, 1, 20)
        eventually(lambda: client.xlen("smartspec:v1:steps:worker-0") == 20)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        play(bus, 21, 20)
        time.sleep(2.0)  # an attempt fails, also where one is slow to begin
        assert process.poll() is None
        server.ensure()
        eventually(lambda: client.xlen("smartspec:v1:steps:worker-0") == 20)
        play(bus, 41, 5)
        eventually(lambda: client.xlen("smartspec:v1:steps:worker-0") == 25)
        seqs = [int(f[b"seq"]) for _, f in client.xrange("smartspec:v1:steps:worker-0")]
        assert seqs == list(range(21, 46))
        assert int(client.hget("smartspec:v1:daemon", "num_failures") or 0) >= 1
        client.close()


def test_embedded_server_is_started_again_when_it_dies(runtime_dir: Path, bus: EventBus) -> None:
    with telemetry_process(runtime_dir, "telemetry.prometheus_port=0") as process:
        client = connected(bus, runtime_dir)
        [server] = psutil.Process(process.pid).children()
        server.kill()
        play(bus, 1, 5)
        eventually(lambda: client.xlen("smartspec:v1:steps:worker-0") == 5)
        client.close()


def test_server_that_is_being_started_is_given_up_when_the_store_is_closed(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mute(EmbeddedValkey):
        def _answers(self) -> bool:
            return False

    monkeypatch.setattr(embedded_valkey, "START_TIMEOUT_S", 0.5)
    server = Mute(runtime_dir / "own.sock")
    client = connect(f"unix://{server.socket_path}")
    store = RedisStore(client, "t:", stream_maxlen=10, ttl_s=60, server=server)
    store.start()
    pid = eventually(lambda: server.pid)
    store.close(timeout_s=0.1)
    eventually(lambda: not psutil.pid_exists(pid))
    assert store._thread is not None
    store._thread.join()  # an exception in it would fail this test


def test_stopped_server_goes_with_telemetry(runtime_dir: Path, bus: EventBus) -> None:
    with telemetry_process(runtime_dir, "telemetry.prometheus_port=0") as process:
        connected(bus, runtime_dir).close()
        [server] = psutil.Process(process.pid).children()
        server.suspend()
        process.terminate()
        _, log = process.communicate(timeout=15)
        assert b"Traceback" not in log
        eventually(lambda: not server.is_running())


def test_no_server_is_left_when_telemetry_is_killed(runtime_dir: Path, bus: EventBus) -> None:
    with telemetry_process(runtime_dir, "telemetry.prometheus_port=0") as process:
        connected(bus, runtime_dir).close()
        [server] = psutil.Process(process.pid).children()
        process.kill()
        eventually(lambda: not server.is_running())


def test_buffer_is_bounded_and_the_gap_is_told_when_redis_is_stopped(runtime_dir: Path) -> None:
    with valkey_server(runtime_dir / "own.sock") as server:
        client = connect(f"unix://{server.socket_path}", timeout_s=0.2)
        store = RedisStore(client, "t:", stream_maxlen=10_000, ttl_s=60, max_buffered=1500)
        store.start()
        store.add(step(0))
        eventually(lambda: store.num_written == 1)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            began = time.perf_counter()
            for seq in range(1, 5001):
                store.add(step(seq))
            assert time.perf_counter() - began < 1.0, "add() waited for Redis"
            eventually(lambda: store.num_failures >= 3)
            assert store.num_buffered == 1500
            assert not store.up
        finally:
            os.kill(server.pid, signal.SIGCONT)
        eventually(lambda: store.up and store.num_buffered == 0)
        seqs = [int(f[b"seq"]) for _, f in client.xrange("t:v1:steps:worker-0")]
        assert len(seqs) == len(set(seqs)), "a repeated batch was written twice"
        assert seqs[-1500:] == list(range(3501, 5001)), "the newest must survive"
        [(_, note)] = client.xrange("t:v1:events")
        assert note[b"kind"] == b"redis_gap"
        assert str(store.num_lost).encode() in note[b"text"]
        store.close()


def test_stopped_redis_leaves_the_process_small_and_alive(runtime_dir: Path, bus: EventBus) -> None:
    port = free_port()
    with telemetry_process(runtime_dir, f"telemetry.prometheus_port={port}") as process:
        client = connected(bus, runtime_dir)
        [server] = psutil.Process(process.pid).children()
        server.suspend()
        before = psutil.Process(process.pid).memory_info().rss
        for seq in range(1, 15_001):
            bus.publish(step(seq))
            bus.publish(decision(seq))
            if seq % 200 == 0:
                time.sleep(0.02)
        grown = psutil.Process(process.pid).memory_info().rss - before
        assert grown < 120 << 20, f"grew by {grown >> 20} MiB"
        # Scraping must work while Redis hangs; a write that hangs is noticed when it times out.
        eventually(lambda: "smartspec_redis_up 0.0" in scrape(port))
        server.resume()
        eventually(lambda: "smartspec_redis_up 1.0" in scrape(port))
        eventually(lambda: client.xlen("smartspec:v1:steps:worker-0") > 1000)
        client.close()


@pytest.mark.parametrize("trouble", ["READONLY", "OOM"])
def test_events_wait_when_redis_refuses_writes(runtime_dir: Path, trouble: str) -> None:
    with valkey_server(runtime_dir / "own.sock") as server:
        client = connect(f"unix://{server.socket_path}")
        other = connect(f"unix://{server.socket_path}")
        if trouble == "READONLY":
            other.replicaof("127.0.0.1", "1")
        else:
            other.config_set("maxmemory-policy", "noeviction")
            other.config_set("maxmemory", "1")
        store = RedisStore(client, "t:", stream_maxlen=100, ttl_s=60)
        store.start()
        store.add(step(1))
        eventually(lambda: store.num_failures >= 2)
        assert (store.num_written, store.num_lost, store.num_buffered) == (0, 0, 1)
        other.replicaof("no", "one")
        other.config_set("maxmemory", "0")
        eventually(lambda: store.num_written == 1)
        assert other.xlen("t:v1:steps:worker-0") == 1
        store.close()
        other.close()


def test_other_engines_are_written_when_a_key_is_of_another_type(runtime_dir: Path) -> None:
    with valkey_server(runtime_dir / "own.sock") as server:
        client = connect(f"unix://{server.socket_path}")
        client.set("t:v1:steps:bad", "not a stream")
        store = RedisStore(client, "t:", stream_maxlen=100, ttl_s=60)
        store.add(step(1, engine="good"))
        store.flush()
        store._last_ids["t:v1:steps:bad"] = (0, 0)
        store.add(step(1, engine="bad"))
        store.add(step(2, engine="good"))
        store.flush()
        assert client.xlen("t:v1:steps:good") == 2
        assert store.num_lost == 1
        store.close()


def test_entries_follow_those_already_there_when_the_clock_is_set_back(runtime_dir: Path) -> None:
    with valkey_server(runtime_dir / "own.sock") as server:
        client = connect(f"unix://{server.socket_path}")
        client.xadd("t:v1:steps:worker-0", {"seq": 1}, id=f"{int(time.time() + 3600) * 1000}-0")
        store = RedisStore(client, "t:", stream_maxlen=100, ttl_s=60)
        for seq in (2, 3):
            store.add(step(seq))
        store.flush()
        assert [int(f[b"seq"]) for _, f in client.xrange("t:v1:steps:worker-0")] == [1, 2, 3]
        store.close()


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_metrics_are_exported_under_their_ids_when_scraped(
    runtime_dir: Path, bus: EventBus
) -> None:
    port = free_port()
    with telemetry_process(runtime_dir, f"telemetry.prometheus_port={port}"):
        connected(bus, runtime_dir).close()
        bus.publish(EngineEvent(engine="worker-0", epoch=1, state="connected"))
        bus.publish(NoteEvent(kind="drift", text="x", level="warning"))
        play(bus, 1, 30)
        done = 'smartspec_decisions_total{engine="worker-0",steering="yes"} 30.0'
        eventually(lambda: done in scrape(port))
        page = scrape(port)
        declared = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE))
        for metric in metric_ids.ALL:
            name = metric.id + ("_total" if metric.kind == "counter" else "")
            assert declared.get(name) == metric.kind
        for line in (
            'smartspec_emitted_tokens_total{engine="worker-0"} 960.0',
            'smartspec_requests_at_length{engine="worker-0",length="3"} 10.0',
            'smartspec_acceptance_ratio{depth="1",engine="worker-0"} 0.8',
            'smartspec_loop_events_total{counter="reports"} 7.0',
            'smartspec_notes_total{kind="drift",level="warning"} 1.0',
            'smartspec_requests_with_target{engine="worker-0",reach="within"} 3.0',
            'smartspec_requests_with_target{engine="worker-0",reach="out"} 2.0',
            'smartspec_predicted_goodput_tokens_per_second{engine="worker-0",lengths="none"} 400.0',
        ):
            assert line in page
        bus.publish(EngineEvent(engine="worker-0", epoch=1, state="left"))
        eventually(lambda: 'engine="worker-0"' not in scrape(port))


class Events:
    """A subscriber with events at hand."""

    def __init__(self, *events: BusEvent) -> None:
        self.waiting = deque(events)
        self.num_missed: dict[str, int] = {}

    def poll(self, timeout_s: float = 0.0) -> BusEvent | None:
        return self.waiting.popleft() if self.waiting else None

    def close(self) -> None:
        pass


def test_engine_is_connected_by_its_steps_when_its_arrival_or_return_went_unheard() -> None:
    """The loop tells of no steps of an engine that has left: these are of one that is back."""
    exporter = PrometheusExporter()
    telemetry = Telemetry(
        Events(
            EngineEvent(engine="worker-0", epoch=1, state="connected"),
            step(1),
            EngineEvent(engine="worker-0", epoch=1, state="left"),
            step(2),
            step(1, engine="worker-1"),
        ),
        None,
        exporter,
    )
    telemetry.turn()
    page = generate_latest(exporter.registry).decode()
    for name in ("worker-0", "worker-1"):
        assert f'smartspec_engine_connected{{engine="{name}"}} 1.0' in page


def test_more_is_taken_in_at_once_when_more_waits_than_a_turn_takes() -> None:
    events = Events(*(step(seq) for seq in range(MAX_EVENTS_PER_TURN + 1)))
    telemetry = Telemetry(events, None, None)
    assert telemetry.turn() == 0.0
    assert len(events.waiting) == 1, "it has other duties too"
    assert telemetry.turn() == TURN_S


def test_health_is_told_while_the_loop_is_heard(runtime_dir: Path, bus: EventBus) -> None:
    port = free_port()

    def status() -> int | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except OSError:
            return None

    with telemetry_process(runtime_dir, f"telemetry.prometheus_port={port}"):
        eventually(lambda: status() is not None)
        assert status() == 503
        connected(bus, runtime_dir).close()  # by events of the loop
        eventually(lambda: status() == 200)


def test_health_is_lost_when_the_loop_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = PrometheusExporter()
    exporter.note(LoopEvent(t_s=0.0, num_engines=0, counters={}, links={}), None)
    assert exporter.is_healthy
    heard = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: heard + 11.0)
    assert not exporter.is_healthy


def test_redis_is_written_when_the_port_for_prometheus_is_taken(
    runtime_dir: Path, bus: EventBus
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with telemetry_process(runtime_dir, f"telemetry.prometheus_port={port}") as process:
            connected(bus, runtime_dir).close()
            process.terminate()
            _, log = process.communicate(timeout=15)
    assert f"telemetry.prometheus_port: cannot listen on 127.0.0.1:{port}" in log.decode()


def test_names_of_engines_that_have_expired_are_taken_off_the_list(runtime_dir: Path) -> None:
    with valkey_server(runtime_dir / "own.sock") as server:
        client = connect(f"unix://{server.socket_path}")
        store = RedisStore(client, "t:", stream_maxlen=10, ttl_s=60)
        client.sadd("t:v1:engines", *(f"pod-{i}" for i in range(1000)))
        store.put_states([EngineState(engine="a", updated_s=time.time())])
        store.flush()
        assert client.smembers("t:v1:engines") == {b"a"}
        client.delete("t:v1:engine:a")
        store.put_states([EngineState(engine="b", updated_s=time.time())])
        store.flush()
        assert client.smembers("t:v1:engines") == {b"a", b"b"}, "it is looked at now and then"
        store.close()


def test_server_of_another_process_is_used_and_left_alone(runtime_dir: Path, bus: EventBus) -> None:
    with valkey_server(runtime_dir / "valkey.sock") as server:
        with telemetry_process(runtime_dir, "telemetry.prometheus_port=0") as process:
            client = connected(bus, runtime_dir)
            assert psutil.Process(process.pid).children() == []
        assert client.ping()
        client.close()
        assert server.pid is not None


def test_documented_keys_are_those_written() -> None:
    text = DOCS.read_text("utf-8")

    def table(heading: str) -> set[str]:
        section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
        return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))

    keys = Keys("<prefix>")
    written = {keys.engines, keys.daemon, keys.events}
    written |= {f("<name>") for f in (keys.engine, keys.steps, keys.decisions)}
    written |= {f("<key>") for f in (keys.learned_of, keys.learned_refused)} | {keys.learned}
    assert table("Keys") == written
    assert table("`engine:<name>`") == set(EngineState.__struct_fields__)
    assert table("`steps:<name>`") == {"type", *StepEvent.__struct_fields__}
    assert table("`decisions:<name>`") == {"type", *DecisionEvent.__struct_fields__}
    assert table("`events`") == {
        *("type", *EngineEvent.__struct_fields__),
        *NoteEvent.__struct_fields__,
    }
    assert table("`daemon`") == {*LoopEvent.__struct_fields__, *redis_store.TOTALS}
