"""What arrives when: one schedule, played the same to every arm."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import msgspec
import numpy as np

#: Arrival rates as shares of what the machine can serve without speculation. The busy phase is
#: beyond it, so its queue grows for as long as the phase lasts.
QUIET_LOAD = 0.35
BUSY_LOAD = 1.3
TARGET_S = 48.0  #: length of a schedule of many prompts, where the machine allows it
#: Share of the prompts that arrive in the quiet phases; within these, chosen to meet TARGET_S.
QUIET_SHARES = (0.22, 0.56)


class Prompt(msgspec.Struct, frozen=True):
    """A user's message, and how long the answer may become."""

    id: str
    kind: str
    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time with one arrival rate."""

    name: str
    begin_s: float
    end_s: float
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """A prompt that arrives ``at_s`` seconds after the schedule's start."""

    at_s: float
    prompt: Prompt
    phase: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """Arrivals in order, and the phases that they fall in."""

    phases: tuple[Phase, ...]
    arrivals: tuple[Arrival, ...]

    @property
    def duration_s(self) -> float:
        return self.phases[-1].end_s

    def phase_at(self, at_s: float) -> str:
        """Name of the phase in force; the last one while what is left is being finished."""
        return next((p.name for p in self.phases if at_s < p.end_s), self.phases[-1].name)


def load_prompts() -> list[Prompt]:
    """The prompts that come with the package: eight kinds, most of which copy from the prompt."""
    lines = (resources.files(__package__) / "prompts.jsonl").read_bytes().splitlines()
    decoder = msgspec.json.Decoder(Prompt)
    return [decoder.decode(line) for line in lines if line.strip()]


def shortened(prompts: Sequence[Prompt], num: int, max_tokens: int) -> list[Prompt]:
    """``num`` of the prompts, of all kinds, with shorter answers: to see that something works."""
    chosen = mixed(prompts, np.random.default_rng(0))[:num]
    return [
        msgspec.structs.replace(prompt, max_tokens=min(max_tokens, prompt.max_tokens))
        for prompt in chosen
    ]


def mixed(prompts: Sequence[Prompt], rng: np.random.Generator) -> list[Prompt]:
    """All prompts in random order, the kinds spread so evenly that any stretch holds a fair mix."""
    by_kind: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        by_kind[prompt.kind].append(prompt)
    placed = []
    for kind in sorted(by_kind):
        members = by_kind[kind]
        order = rng.permutation(len(members))
        offset = rng.random()
        placed += [
            ((place + offset) / len(members), kind, members[member])
            for place, member in enumerate(order)
        ]
    return [prompt for _, _, prompt in sorted(placed, key=lambda item: item[:2])]


def build(prompts: Sequence[Prompt], capacity: float, seed: int) -> Schedule:
    """Quiet, busy past ``capacity``, quiet again; every prompt once.

    Within a phase, arrivals are a Poisson process given its number of arrivals (independent and
    uniform over the phase), so that the phases' loads are what they are said to be. How many
    prompts n_q of n are quiet follows from n_q / r_q + (n - n_q) / r_b = TARGET_S, where r are the
    arrival rates, within QUIET_SHARES.

    Parameters
    ----------
    prompts : at least 3
    capacity : requests per second that the machine serves without speculation, > 0
    seed : of order and arrivals

    >>> [phase.name for phase in build(load_prompts(), 2.5, seed=0).phases]
    ['quiet', 'busy', 'quiet_again']
    """
    if not (math.isfinite(capacity) and capacity > 0):
        raise ValueError(f"capacity must be positive, got {capacity}")
    num = len(prompts)
    if num < 3:
        raise ValueError(f"three phases need at least 3 prompts, got {num}")
    rng = np.random.default_rng(seed)
    quiet, busy = QUIET_LOAD * capacity, BUSY_LOAD * capacity
    wanted = (TARGET_S - num / busy) / (1 / quiet - 1 / busy)
    low, high = (round(share * num) for share in QUIET_SHARES)
    num_quiet = min(max(round(wanted), low, 2), high, num - 1)
    counts = (num_quiet // 2, num - num_quiet, num_quiet - num_quiet // 2)
    order = iter(mixed(prompts, rng))
    phases: list[Phase] = []
    arrivals: list[Arrival] = []
    begin_s = 0.0
    for name, count, rate in zip(
        ("quiet", "busy", "quiet_again"), counts, (quiet, busy, quiet), strict=True
    ):
        phase = Phase(name, begin_s, begin_s + count / rate, rate)
        phases.append(phase)
        times = np.sort(rng.uniform(phase.begin_s, phase.end_s, count)).tolist()
        arrivals += [Arrival(at_s, next(order), name) for at_s in times]
        begin_s = phase.end_s
    return Schedule(tuple(phases), tuple(arrivals))
