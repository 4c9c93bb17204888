"""From a report's arrival to its policy's departure, for one engine with 256 running requests.

The loop runs in this process against a real socket; the reports are those of a scripted engine
(a mock: it has no model) whose batch changes by one request every fourth step; in the case
`prompts` every other step carries 512 tokens of prompts, which are solved for apart; `trees` has 64
requests with trees of up to 64 nodes. Measured
inside the loop, from the receipt of a frame to the hand-over of the policy to ZeroMQ; `learn` and
`solve` are parts of the same turn, and learning comes after the policy has left.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from figures import percentiles_ms, record
from scripted_engine import Costs, ScriptedEngine, hello

from smartspec.daemon import outlook
from smartspec.daemon.config import load
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.event_bus import EventBus
from smartspec.daemon.transport import Server
from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.messages import MAX_LENGTH
from smartspec.engine_adapter.optimum import Optimum


class StampedServer(Server):
    """Notes when the first frame of a turn was received, and when the last was sent."""

    received_at = 0.0
    sent_at = 0.0

    def receive(self) -> tuple[bytes, bytes] | None:
        got = super().receive()
        if got is not None and not self.received_at:
            self.received_at = time.perf_counter()
        return got

    def send(self, peer: bytes, frame: bytes) -> None:
        super().send(peer, frame)
        if len(frame) > 200:  # a policy, not a heartbeat
            self.sent_at = time.perf_counter()


def measure(
    lookup: bool,
    num_running: int,
    num_steps: int,
    seed: int,
    num_prompt_tokens: int = 0,
    max_length: int = 5,
    trees: bool = False,
) -> dict[str, float]:
    """Figures of one kind of proposer, with prompts in every other step."""
    solve_s: list[float] = []
    solve = outlook.solve

    def timed_solve(*args: object) -> Optimum:
        began = time.perf_counter()
        optimum = solve(*args)  # type: ignore[arg-type]
        solve_s.append(time.perf_counter() - began)
        return optimum

    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/engines.sock"
        server = StampedServer(endpoint)
        bus = EventBus.bind(f"ipc://{folder}/bus.sock")
        loop = ControlLoop(load(None, {"SMARTSPEC_RUNTIME_DIR": folder}, {}), server, bus)
        greeting = hello(
            lookup=lookup, max_num_running=num_running, max_length=max_length, trees=trees
        )
        link = EngineLink(endpoint, greeting)
        while not link.stats.num_connections:
            link.idle()
            loop.cycle(0.01)
        rng = np.random.default_rng(seed)
        engine = ScriptedEngine(
            link,
            rng.beta(3, 2, num_running),
            Costs(draft_forward_s=0.0 if lookup else 0.004),
            max_length=max_length,
            lookup=lookup,
            match_rate=0.5,
            seed=seed,
            gains=rng.beta(3, 2, (num_running, 1)) / np.arange(1, max_length + 1)
            if trees
            else None,
        )
        outlook.solve = timed_solve  # type: ignore[assignment]
        decided, learned = [], []
        gc.collect()
        gc.freeze()
        try:
            for step in range(num_steps):
                if step % 4 == 0:
                    engine.replace(1, rng.beta(3, 2, 1))
                engine.num_prefill_tokens = num_prompt_tokens * (step % 2)
                engine.step()
                server.received_at = server.sent_at = 0.0
                loop.cycle(1.0)
                ended = time.perf_counter()
                if step >= 100 and server.sent_at:
                    decided.append(server.sent_at - server.received_at)
                    learned.append(ended - server.sent_at)
        finally:
            outlook.solve = solve
        link.close()
        loop.close()
        bus.close()
    figures = percentiles_ms(decided, "decision")
    figures["learn_p50_ms"] = float(np.median(learned) * 1e3)
    figures["solve_p50_ms"] = float(np.median(solve_s) * 1e3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draft = measure(False, args.requests, args.steps, args.seed)
    lookup = measure(True, args.requests, args.steps, args.seed)
    prompts = measure(False, args.requests, args.steps, args.seed, num_prompt_tokens=512)
    trees = measure(False, 64, args.steps, args.seed, max_length=MAX_LENGTH, trees=True)
    # The draft model is the dearer case (it searches depths) and the one that counts.
    record(
        "decision",
        draft
        | {f"lookup_{name}": value for name, value in lookup.items()}
        | {f"prompts_{name}": value for name, value in prompts.items()}
        | {f"trees_{name}": value for name, value in trees.items()},
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
