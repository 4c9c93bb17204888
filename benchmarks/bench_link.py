"""What the engine pays per step for being steered: take in the policy, choose lengths, report.

Scripted batches (no model) at 64 and 256 requests, unchanged from step to step; every step has a
new policy of the real daemon code. Three settings:

* *tight* (``tight_*``): policies recorded before are played back, and nothing else runs in between:
  what the code itself costs, with warm caches;
* *warm* (``link_*``): daemon and engine take turns in this process, a step right after a policy;
* *paused* (``paused_*``): the daemon is a process of its own, and the engine's thread is busy with
  other things between steps, so that caches have gone cold, as they have in an engine. What a fixed
  length costs in the same setting is given beside it.

Then the daemon is stopped (SIGSTOP) and killed, in both settings: what an engine pays over a fixed
length while it is not steered.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import zmq

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from figures import record
from scripted_engine import hello

from smartspec.daemon.config import load
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.event_bus import NullBus
from smartspec.daemon.transport import Server
from smartspec.engine_adapter import messages
from smartspec.engine_adapter.base import DecodeBatch, FixedLength, LengthSource, StepFacts
from smartspec.engine_adapter.link import EngineLink


def scripted_step(size: int) -> tuple[DecodeBatch, StepFacts]:
    batch = DecodeBatch(
        request_ids=np.arange(size, dtype=np.uint64),
        ceiling=np.full(size, 5, np.uint8),
        features=np.full((2, size), 1.0, np.float32),
    )
    facts = StepFacts(
        batch=batch,
        num_drafted=np.full(size, 3, np.uint8),
        num_accepted=np.full(size, 2, np.uint8),
        num_emitted=np.full(size, 3, np.uint8),
        step_s=0.02 + 1e-4 * size,
        target_s=0.019 + 1e-4 * size,
        draft_s=0.0001,
        context_tokens=300 * size,
        num_draft_tokens=3 * size,
    )
    return batch, facts


def time_steps(source: LengthSource, size: int, num_steps: int, pause_s: float) -> list[float]:
    """Seconds of `choose` plus `report` in each step."""
    batch, facts = scripted_step(size)
    taken = []
    for _ in range(num_steps):
        until = time.perf_counter() + pause_s
        while time.perf_counter() < until:
            pass  # the engine's thread is busy, not asleep
        began = time.perf_counter()
        source.choose(batch)
        source.report(facts)
        taken.append(time.perf_counter() - began)
    return taken


def take_turns(size: int, num_steps: int) -> list[float]:
    """Seconds of `choose` plus `report`, each with a policy just arrived, warm."""
    batch, facts = scripted_step(size)
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/engines.sock"
        settings = load(None, {"SMARTSPEC_RUNTIME_DIR": folder}, {})
        loop = ControlLoop(settings, Server(endpoint), NullBus())
        link = EngineLink(endpoint, hello("turns", size))
        while not link.stats.num_connections:
            link.idle()
            loop.cycle(0.01)
        for _ in range(num_steps):
            seen = link.stats.num_policies
            began = time.perf_counter()
            link.choose(batch)
            link.report(facts)
            seconds = time.perf_counter() - began
            if link.stats.num_policies > seen:
                taken.append(seconds)
            loop.cycle(0.1)
        link.close()
        loop.close()
    return taken[len(taken) // 10 :]


def play_back(size: int, num_steps: int) -> list[float]:
    """Seconds of `choose` plus `report` under recorded policies, with nothing in between."""
    batch, facts = scripted_step(size)
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/engines.sock"
        server = RecordingServer(endpoint)
        settings = load(None, {"SMARTSPEC_RUNTIME_DIR": folder}, {})
        loop = ControlLoop(settings, server, NullBus())
        link = EngineLink(endpoint, hello("recorded", size))
        while len(server.sent) < num_steps:
            link.choose(batch)
            link.report(facts)
            loop.cycle(0.1)
        taken = []
        for peer, frame in server.sent:
            policy = messages.decode_daemon_message(frame)
            if not isinstance(policy, messages.Policy):
                continue
            newer = msgspec.structs.replace(policy, seq=policy.seq + 2 * num_steps)
            Server.send(server, peer, messages.encode(newer))
            seen, deadline = link.stats.num_policies, time.monotonic() + 1.0
            while not link._ready() & zmq.POLLIN and time.monotonic() < deadline:
                pass  # as hot as can be
            began = time.perf_counter()
            link.choose(batch)
            link.report(facts)
            seconds = time.perf_counter() - began
            if link.stats.num_policies > seen:
                taken.append(seconds)
            while server.receive():
                pass
        link.close()
        loop.close()
    return taken[len(taken) // 10 :]


class RecordingServer(Server):
    """Keeps what it sends."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.sent: list[tuple[bytes, bytes]] = []

    def send(self, peer: bytes, frame: bytes) -> bool:
        self.sent.append((peer, frame))
        return super().send(peer, frame)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--pause-ms", type=float, default=4.0)
    args = parser.parse_args()
    pause_s = args.pause_ms / 1e3
    figures: dict[str, float] = {}
    for size in (64, 256):
        figures[f"tight_{size}_p50_us"] = float(np.median(play_back(size, args.steps))) * 1e6
        warm = np.array(take_turns(size, args.steps)) * 1e6
        figures[f"link_{size}_p50_us"] = float(np.median(warm))
        figures[f"link_{size}_p99_us"] = float(np.percentile(warm, 99))
    figures["fixed_length_us"] = float(np.median(time_steps(FixedLength(3), 256, 500, 0.0))) * 1e6
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "SMARTSPEC_RUNTIME_DIR": folder,
            "SMARTSPEC_STATE_ENABLED": "false",
        }
        command = [sys.executable, "-m", "smartspec.daemon.cli", "run"]
        environment["SMARTSPEC_TELEMETRY_ENABLED"] = "false"
        daemon = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        try:
            for size in (64, 256):
                link = EngineLink(f"ipc://{folder}/engines.sock", hello(f"bench{size}", size))
                deadline = time.monotonic() + 20
                while link.stats.state != "policy":
                    time_steps(link, size, 1, pause_s)
                    if time.monotonic() > deadline:
                        raise SystemExit("no policy came from the daemon within 20 s")
                taken = np.array(time_steps(link, size, args.steps, pause_s)) * 1e6
                figures[f"paused_{size}_p50_us"] = float(np.median(taken))
                if size == 64:
                    link.close()
            own = float(np.median(time_steps(FixedLength(3), 256, args.steps, pause_s))) * 1e6
            figures["paused_fixed_length_us"] = own
            for what, kill in (("stopped", signal.SIGSTOP), ("dead", signal.SIGKILL)):
                daemon.send_signal(kill)
                time.sleep(1.2)
                link.choose(scripted_step(256)[0])  # past the time to live
                link._program = None  # and past the fallback, which lasts a minute
                warm = np.median(time_steps(link, 256, args.steps, 0.0)) * 1e6
                figures[f"{what}_daemon_extra_us"] = float(warm) - figures["fixed_length_us"]
                cold = np.median(time_steps(link, 256, args.steps, pause_s)) * 1e6
                figures[f"paused_{what}_daemon_extra_us"] = float(cold) - own
            link.close()
        finally:
            daemon.kill()
            daemon.wait()
    record("link", figures)


if __name__ == "__main__":
    main()
