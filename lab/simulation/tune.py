"""`smartspec tune`: the best static table of lengths, and what it gives up against live control.

For engines without a sidecar. The table is the greatest goodput for each batch size with the mean
context of the traffic, requests being all alike; then it is played against SmartSpec, which has
served other requests of the same traffic before, on requests that neither has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np

from smartspec.daemon.state import learned
from smartspec.daemon.state.library import Library
from smartspec.daemon.state.state_directory import StateDirectory
from smartspec.engine_adapter.simulator.profile import Profile
from smartspec.lab.profiles import observed
from smartspec.lab.simulation.experiment import interval
from smartspec.lab.simulation.static_table import Entry, Ground, ListedLengths, beta_survival
from smartspec.lab.simulation.workload import Count, Positive, Workload
from smartspec.lab.simulation.world import Fleet, serve, simulate

WARM_SEED = 1_000_003  #: of the requests that SmartSpec has served before


class Tuning(Workload, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to tune for."""

    state: str = ""  #: a file of learned state, in place of profile, draft and acceptance
    loads: tuple[Positive, ...] = (0.2, 0.5, 0.8)  #: at which the table is played
    num_seeds: Count = 5

    def load_profile(self) -> Profile:
        return (
            _learned(self.state, self.max_num_running)[0] if self.state else super().load_profile()
        )


class Comparison(msgspec.Struct, frozen=True):
    """The table at a load, as ratios of mean latency over the same requests; above 1: it is slower.

    Geometric means and 95% intervals over seeds, NaN for two seeds or fewer.
    """

    load: float
    latency_mean_s: float
    over_live: float  #: over SmartSpec's
    over_live_low: float
    over_live_high: float
    over_none: float  #: over no speculation's
    over_none_low: float
    over_none_high: float


class Tuned(msgspec.Struct, frozen=True):
    """What came of it."""

    table: tuple[Entry, ...]
    vllm: dict[str, object]
    tensorrt_llm: dict[str, object]
    sglang: dict[str, list[int]]
    comparisons: tuple[Comparison, ...]


def ground(tuning: Tuning) -> tuple[Tuning, Ground]:
    """What to tune for, as far as ``state`` says it, and what tuning stands on.

    Raises ValueError for a profile or state that is not, or cannot be used.
    """
    if tuning.trees:
        raise ValueError("a table is fitted to chains: leave trees out")
    if tuning.state and tuning.drafts:
        raise ValueError("state tells what drafts brought: leave out drafts, or state")
    if tuning.state:
        models = _learned(tuning.state, tuning.max_num_running)[1]
        found = observed.acceptance_of_learned(models)
        tuning = msgspec.structs.replace(
            tuning,
            draft="lookup" if models.key.drafts_known_first else "own",
            acceptance=found.acceptance,
            concentration=found.concentration,
            presence=found.presence,
            max_length=max(1, min(tuning.max_length, models.key.max_length)),
        )
        learned_survival = np.cumprod(models.acceptance.pooled_hazards(), dtype=np.float64)
        survival = tuple(learned_survival[: tuning.max_length].tolist())
    else:
        tuning.check()
        seen = tuning.drafts_seen()
        survival = beta_survival(seen.acceptance, seen.concentration, tuning.max_length)
    prompt, output = tuning.mean_lengths()
    presence = tuning.drafts_seen().presence
    on = Ground(tuning.load_profile(), tuning.draft, survival, presence, prompt + output / 2)
    return tuning, on


@lru_cache(maxsize=4)
def _learned(state: str, max_num_running: int) -> tuple[Profile, learned.Learned]:
    path = Path(state)
    checkpoint: learned.Checkpoint | None
    if path.is_dir():
        known = [one for one in StateDirectory(path).entries() if one.checkpoint is not None]
        if len(known) != 1:
            names = ", ".join(one.path.name for one in known) or "none"
            raise ValueError(f"{path}: {len(known)} kinds of engines ({names}): name one file")
        checkpoint = known[0].checkpoint
    else:
        try:
            checkpoint = learned.decode(path.read_bytes())
            learned.check(checkpoint)
        except (OSError, learned.RefusedState) as error:
            raise ValueError(f"{path}: {error}") from error
    assert checkpoint is not None
    if checkpoint.key.trees:
        raise ValueError(f"{path}: learned of trees, and a table is fitted to chains")
    models = learned.restore(checkpoint)
    seen = observed.of_learned(models, max_num_running)
    return observed.fit(seen, path.stem, source="as the daemon's model has them"), models


def as_vllm(entries: Sequence[Entry]) -> dict[str, object]:
    """Part of vLLM's ``--speculative-config``; its ranges have both ends among them."""
    return {
        "num_speculative_tokens": max(1, *(e.length for e in entries)),
        "num_speculative_tokens_per_batch_size": [[e.low, e.high, e.length] for e in entries],
    }


def as_tensorrt_llm(entries: Sequence[Entry]) -> dict[str, object]:
    """Of a TensorRT-LLM speculative config; a key is the largest batch of its length, and larger
    batches than all keys do not draft.
    """
    last = max((i for i, e in enumerate(entries) if e.length), default=-1)
    return {
        "max_draft_len": max(1, *(e.length for e in entries)),
        "draft_len_schedule": {str(e.high): e.length for e in entries[: last + 1]},
    }


def as_sglang(entries: Sequence[Entry]) -> dict[str, list[int]]:
    """Tiers of SGLang's adaptive speculation: candidate lengths from a batch size on.

    One candidate a tier, so that its moving average does not choose.
    """
    return {str(e.low): [e.length] for e in entries}


def compare(
    tuning: Tuning, entries: Sequence[Entry], load: float, note: Callable[[], None] = lambda: None
) -> Comparison:
    """Play the table, SmartSpec and no speculation; ``note`` is called after each seed."""
    before = Fleet([tuning.cell(load, WARM_SEED)])
    before.run()
    library = Library()
    for event in before.loop.checkpoints():
        library.put(learned.decode(event.frame))
    latency: list[float] = []
    over: dict[str, list[float]] = {"smartspec": [], "none": []}
    for seed in range(tuning.num_seeds):
        cell = tuning.cell(load, seed)
        mine = float(serve(ListedLengths(entries), cell).served.latency_s.mean())
        latency.append(mine)
        for name, logs in over.items():
            other = simulate(name, cell, library=library).served.latency_s.mean()
            logs.append(math.log(mine / float(other)))
        note()
    live, none = (tuple(math.exp(x) for x in interval(logs)) for logs in over.values())
    return Comparison(load, float(np.mean(latency)), *live, *none)


def tune(tuning: Tuning, note: Callable[[], None] = lambda: None) -> Tuned:
    """Find the table and play it. Raises ValueError for what cannot be used."""
    tuning, on = ground(tuning)
    for load in tuning.loads:
        tuning.traffic(load, seed=0)  # what cannot be played is told before anything is
    entries = on.table(tuning.max_num_running)
    return Tuned(
        entries,
        as_vllm(entries),
        as_tensorrt_llm(entries),
        as_sglang(entries),
        tuple(compare(tuning, entries, load, note) for load in tuning.loads),
    )


def show(tuning: Tuning, as_json: bool) -> None:
    """Tune and print. Raises ValueError for what cannot be used."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("playing the table", total=len(tuning.loads) * tuning.num_seeds)
        found = tune(tuning, lambda: progress.advance(task))
    if as_json:
        print(msgspec.json.encode({"tuning": tuning, "tuned": found}).decode())
        return
    print("length by batch size:")
    for e in found.table:
        print(f"  {e.low:>4} to {e.high:<4} {e.length}")
    print("\nvLLM, in --speculative-config:")
    print(f"  {msgspec.json.encode(found.vllm).decode()}")
    print("TensorRT-LLM, in the speculative config (a key is the largest batch of its length):")
    print(f"  {msgspec.json.encode(found.tensorrt_llm).decode()}")
    print("SGLang, tiers of adaptive speculation (from a batch on, these steps):")
    print(f"  {msgspec.json.encode(found.sglang).decode()}")
    print("\nmean latency under this table (95% intervals over seeds; above 1x: it is slower):")
    for c in found.comparisons:
        print(
            f"  load {c.load:<5g} {c.latency_mean_s:.3f} s   of SmartSpec's "
            f"{c.over_live:.3f}x ({c.over_live_low:.3f} to {c.over_live_high:.3f})   of none's "
            f"{c.over_none:.3f}x ({c.over_none_low:.3f} to {c.over_none_high:.3f})"
        )
