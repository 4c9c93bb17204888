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
from typing import NamedTuple

import msgspec
import numpy as np

from smartspec.daemon import learned
from smartspec.daemon.library import Library
from smartspec.daemon.state_directory import StateDirectory
from smartspec.engine_adapter.simulator.profile import Profile
from smartspec.engine_adapter.simulator.requests import F64
from smartspec.lab.profiles import observed
from smartspec.lab.simulation.experiment import interval
from smartspec.lab.simulation.policies import BatchLength
from smartspec.lab.simulation.workload import Count, Positive, Workload
from smartspec.lab.simulation.world import Fleet, serve, simulate

WARM_SEED = 1_000_003  #: of the requests that SmartSpec has served before

WITHIN = 0.005


class Tuning(Workload, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to tune for."""

    state: str = ""  #: a file of learned state, in place of profile, draft and acceptance
    loads: tuple[Positive, ...] = (0.2, 0.5, 0.8)  #: at which the table is played
    num_seeds: Count = 5

    def load_profile(self) -> Profile:
        return (
            _learned(self.state, self.max_num_running)[0] if self.state else super().load_profile()
        )


class Entry(msgspec.Struct, frozen=True):
    """A length for a range of batch sizes, both ends among them."""

    low: int
    high: int
    length: int


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


class ListedLengths(BatchLength):
    """A table as an engine would run it."""

    def __init__(self, table: Sequence[Entry]) -> None:
        super().__init__()
        self._by_size = [0, *(e.length for e in table for _ in range(e.low, e.high + 1))]

    def at(self, num_running: int) -> int:
        return self._by_size[min(num_running, len(self._by_size) - 1)]


class Ground(NamedTuple):
    """What tuning stands on: a profile and survivals of an average request."""

    tuning: Tuning
    gpu: Profile
    survival: F64  #: [max_length]
    presence: float


def beta_survival(mean: float, concentration: float, max_length: int) -> F64:
    """P(at least j drafts are accepted) of a Beta over requests: its moments, [max_length].

    >>> beta_survival(0.5, 2.0, 2).round(3).tolist()
    [0.5, 0.333]
    """
    j = np.arange(max_length, dtype=np.float64)
    return np.cumprod((mean * concentration + j) / (concentration + j), dtype=np.float64)


def ground(tuning: Tuning) -> Ground:
    """Raises ValueError for a profile or state that is not, or cannot be used."""
    if not tuning.state:
        tuning.check()
        survival = beta_survival(tuning.acceptance, tuning.concentration, tuning.max_length)
        presence = tuning.presence if tuning.draft == "lookup" else 1.0
        return Ground(tuning, tuning.load_profile(), survival, presence)
    gpu, models = _learned(tuning.state, tuning.max_num_running)
    found = observed.acceptance_of_learned(models)
    is_lookup = models.key.drafts_known_first
    tuning = msgspec.structs.replace(
        tuning,
        draft="lookup" if is_lookup else "own",
        acceptance=found.acceptance,
        concentration=found.concentration,
        presence=found.presence,
        max_length=max(1, min(tuning.max_length, models.key.max_length)),
    )
    survival = np.cumprod(models.acceptance.pooled_hazards(), dtype=np.float64)
    presence = found.presence if is_lookup else 1.0
    return Ground(tuning, gpu, survival[: tuning.max_length], presence)


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
        raise ValueError(f"{path}: learned of trees, and the simulator's drafts are chains")
    models = learned.restore(checkpoint)
    seen = observed.of_learned(models, max_num_running)
    return observed.fit(seen, path.stem, source="as the daemon's model has them"), models


def goodput_by_length(on: Ground, size: int, context: float) -> F64:
    """Tokens per second of a batch of ``size`` at each length for all, [max_length + 1]."""
    lengths = np.arange(len(on.survival) + 1)
    tokens = size * (1.0 + on.presence * np.concatenate([[0.0], np.cumsum(on.survival)]))
    drafts = size * lengths * on.presence
    curve = on.gpu.curve(size, int(size * context), (), size * len(lengths))
    cost = on.gpu.draft(on.tuning.draft)
    drafting = cost.fixed_s + cost.per_forward_s * lengths + cost.per_token_s * drafts
    found: F64 = tokens / (curve.at(size + drafts) + np.where(lengths > 0, drafting, 0.0))
    return found


def table(on: Ground) -> tuple[Entry, ...]:
    """The best single length for every batch size, as ranges.

    A length is kept on while it is within `WITHIN` of the best: graph sizes make the best one
    jump to and fro for nothing.
    """
    prompt, output = on.tuning.mean_lengths()
    entries: list[Entry] = []
    for size in range(1, on.tuning.max_num_running + 1):
        by_length = goodput_by_length(on, size, prompt + output / 2)
        last = entries[-1] if entries else None
        if last and by_length[last.length] >= (1 - WITHIN) * by_length.max():
            entries[-1] = Entry(last.low, size, last.length)
        else:
            entries.append(Entry(size, size, int(np.argmax(by_length))))
    return tuple(entries)


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
    on: Ground, entries: Sequence[Entry], load: float, note: Callable[[], None] = lambda: None
) -> Comparison:
    """Play the table, SmartSpec and no speculation; ``note`` is called after each seed."""
    tuning = on.tuning
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
    on = ground(tuning)
    entries = table(on)
    return Tuned(
        entries,
        as_vllm(entries),
        as_tensorrt_llm(entries),
        as_sglang(entries),
        tuple(compare(on, entries, load, note) for load in tuning.loads),
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
