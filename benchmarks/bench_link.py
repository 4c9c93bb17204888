"""What the engine pays per step for being steered: take in the policy, choose lengths, report.

Scripted batches (no model) at 64 and 256 requests, the same from step to step, that draft what they
are told and accept each draft with a probability of the request's own. The daemon sends a policy
when it would change something, and one in 17 steps anyway; figures are over all steps, and
(``*_told_*``) over those that a policy came to. Settings:

* *tight* (``tight_*``): what the daemon sent is recorded and played back, and nothing else runs in
  between: what the code itself costs, with warm caches;
* *moving* (``moving_*``): as *tight*, but every request's features are others at every step, as the
  match lengths of prompt lookup are, so that lengths are chosen anew at every step;
* *trees* (``trees_*``, ``moving_trees_*``): as *tight* and *moving*, with trees of up to 64 nodes;
* *warm* (``link_*``): daemon and engine take turns in this process;
* *paused* (``paused_*``): the daemon is a process of its own, and the engine's thread is busy with
  other things between steps, so that caches have gone cold, as they have in an engine. What a fixed
  length costs in the same setting is given beside it.

Then the daemon is stopped (SIGSTOP) and killed, in both settings: what an engine pays over a fixed
length while it is not steered.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import zmq

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import live_daemon
from figures import record
from scripted_engine import hello, ranks

from smartspec.daemon.config import load
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.event_bus import NullBus
from smartspec.daemon.transport import Server
from smartspec.engine_adapter import messages
from smartspec.engine_adapter.base import DecodeBatch, FixedLength, LengthSource, StepFacts
from smartspec.engine_adapter.lengths import I64
from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.messages import MAX_LENGTH


class Steps:
    """A batch that stays, and what its steps do; ``moving``: but for its features.

    ``trees``: a draft is not reached through those before it, and is accepted the less often, the
    later in rank.
    """

    def __init__(self, size: int, moving: bool = False, trees: bool = False) -> None:
        rng = np.random.default_rng(size)
        self._moving = moving
        self._trees = trees
        most = MAX_LENGTH if trees else 5
        self._features = rng.integers(0, 12, (64, 2, size)).astype(np.float32)
        self._ranks = np.arange(most)[:, None]
        self._accepting = rng.beta(3, 2, size) / (1 + self._ranks * trees)
        self._draws = rng.random((64, most, size))
        self._step = 0
        self.batch = DecodeBatch(
            request_ids=np.arange(size, dtype=np.uint64),
            ceiling=np.full(size, most, np.uint8),
            features=np.full((2, size), 1.0, np.float32),
        )

    def facts(self, lengths: I64) -> StepFacts:
        """A step of the lengths chosen."""
        size = self.batch.size
        hit = self._draws[self._step % 64] < self._accepting
        self._step += 1
        hit &= self._ranks < lengths
        if not self._trees:
            hit = np.logical_and.accumulate(hit)
        accepted = hit.sum(axis=0)
        batch = self.batch
        if self._moving:
            self.batch = replace(batch, features=self._features[self._step % 64])
        num_drafts = int(lengths.sum())
        target_s = 0.02 + 1e-4 * (size + num_drafts)
        return StepFacts(
            batch=batch,
            num_drafted=lengths.astype(np.uint8),
            num_accepted=accepted.astype(np.uint8),
            num_emitted=(accepted + 1).astype(np.uint8),
            step_s=target_s + 0.0002,
            target_s=target_s,
            draft_s=0.0001,
            context_tokens=300 * size,
            num_draft_tokens=num_drafts,
            accepted_ranks=ranks(hit.T) if self._trees else None,
        )


def time_step(source: LengthSource, steps: Steps) -> float:
    """Seconds of `choose` plus `report`, without what the engine does in between."""
    began = time.perf_counter()
    choice = source.choose(steps.batch)
    chosen = time.perf_counter()
    facts = steps.facts(choice.lengths)
    ran = time.perf_counter()
    source.report(facts)
    return chosen - began + time.perf_counter() - ran


def time_steps(source: LengthSource, size: int, num_steps: int, pause_s: float) -> list[float]:
    """Seconds of each step; the engine's thread is busy for ``pause_s`` between them."""
    steps = Steps(size)
    taken = []
    for _ in range(num_steps):
        until = time.perf_counter() + pause_s
        while time.perf_counter() < until:
            pass  # busy, not asleep
        taken.append(time_step(source, steps))
    return taken


def take_turns_and_play_back(
    size: int, num_steps: int, names: tuple[str, str], moving: bool = False, trees: bool = False
) -> dict[str, float]:
    """Two settings: taking turns with the daemon, and playing back what it sent in it."""
    steps = Steps(size, moving, trees)
    greeting = hello("turns", size, max_length=MAX_LENGTH if trees else 5, trees=trees)
    warm: list[tuple[bool, float]] = []
    tight: list[tuple[bool, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/engines.sock"
        server = RecordingServer(endpoint)
        settings = load(None, {"SMARTSPEC_RUNTIME_DIR": folder}, {})
        loop = ControlLoop(settings, server, NullBus())
        link = EngineLink(endpoint, greeting)
        while not link.stats.num_connections:
            link.idle()
            loop.cycle(0.01)
        sent: list[list[tuple[bytes, messages.Policy]]] = []
        for _ in range(num_steps):
            seen = link.stats.num_policies
            taken = time_step(link, steps)
            warm.append((link.stats.num_policies > seen, taken))
            server.sent.clear()
            loop.cycle(0.1)
            sent.append(server.sent.copy())
        for policies in sent:
            for peer, policy in policies:
                newer = msgspec.structs.replace(policy, seq=policy.seq + 2 * num_steps)
                Server.send(server, peer, messages.encode(newer))
                deadline = time.monotonic() + 1.0
                while not link._ready() & zmq.POLLIN and time.monotonic() < deadline:
                    pass  # as hot as can be
            seen = link.stats.num_policies
            taken = time_step(link, steps)
            tight.append((link.stats.num_policies > seen, taken))
            while server.receive():
                pass
        link.close()
        loop.close()
    return _in_us(names[0], size, warm) | _in_us(names[1], size, tight)


def _in_us(setting: str, size: int, taken: list[tuple[bool, float]]) -> dict[str, float]:
    told, seconds = np.array(taken[len(taken) // 10 :]).T
    told = told.astype(bool)
    return {
        f"{setting}_{size}_p50_us": float(np.median(seconds)) * 1e6,
        f"{setting}_{size}_p99_us": float(np.percentile(seconds, 99)) * 1e6,
        f"{setting}_{size}_told_p50_us": float(np.median(seconds[told])) * 1e6,
        f"{setting}_{size}_told_share": float(told.mean()),
    }


class RecordingServer(Server):
    """Keeps the policies that it sends."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.sent: list[tuple[bytes, messages.Policy]] = []

    def send(self, peer: bytes, frame: bytes) -> bool:
        message = messages.decode_daemon_message(frame)
        if isinstance(message, messages.Policy):
            self.sent.append((peer, message))
        return super().send(peer, frame)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--pause-ms", type=float, default=4.0)
    args = parser.parse_args()
    pause_s = args.pause_ms / 1e3
    figures: dict[str, float] = {}
    for size in (64, 256):
        figures |= take_turns_and_play_back(size, args.steps, ("link", "tight"))
        figures |= take_turns_and_play_back(size, args.steps, ("moving_warm", "moving"), True)
    for moving in (False, True):
        name = "moving_trees" if moving else "trees"
        figures |= take_turns_and_play_back(
            64, args.steps, (f"{name}_warm", name), moving, trees=True
        )
    figures["fixed_length_us"] = float(np.median(time_steps(FixedLength(3), 256, 500, 0.0))) * 1e6
    with (
        live_daemon.folder() as folder,
        live_daemon.daemon(folder, state__enabled=False, telemetry__enabled=False) as (
            settings,
            daemon,
        ),
    ):
        for size in (64, 256):
            link = EngineLink(settings.endpoint, hello(f"bench{size}", size))
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
            link.choose(Steps(256).batch)  # its last words are heard now,
            time.sleep(1.2)  # and it is silent for longer than SILENCE_S
            link.choose(Steps(256).batch)  # past the time to live
            link._program = None  # and past the fallback, which lasts a minute
            warm = np.median(time_steps(link, 256, args.steps, 0.0)) * 1e6
            figures[f"{what}_daemon_extra_us"] = float(warm) - figures["fixed_length_us"]
            cold = np.median(time_steps(link, 256, args.steps, pause_s)) * 1e6
            figures[f"paused_{what}_daemon_extra_us"] = float(cold) - own
        link.close()
    record("link", figures)


if __name__ == "__main__":
    main()
