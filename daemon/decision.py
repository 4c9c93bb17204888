"""What has been decided for an engine: what it is to run, what that should bring, and why."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from smartspec.daemon.outlook import Expected
from smartspec.engine_adapter.lengths import I64, RAGGED
from smartspec.engine_adapter.messages import Policy
from smartspec.engine_adapter.optimum import Optimum


class Arm(enum.StrEnum):
    """What an engine can be made to run, so that goodputs can be compared."""

    SMARTSPEC = "smartspec"  #: the lengths of greatest goodput
    OWN = "own"  #: its own configuration, whatever that is
    NONE = "none"  #: no speculation


class Order(NamedTuple):
    """What a policy says, beside what is known: the rest of it is an `Outlook`."""

    arm: Arm
    value_of_time: float
    depth: int
    reason: str
    probe_length: int = 0
    num_probes: int = 0
    by_confidence: bool = False
    deepest: int = 0  #: to which an engine may draft of itself; 0: to ``depth``
    is_sweep: bool = False  #: to seed the models: lengths are not the best
    num_targets: int = 0  #: requests that ask for a time per token
    num_out_of_reach: int = 0  #: of these, who cannot have it

    @property
    def is_bound(self) -> bool:
        """Whether targets bend the lengths: the engine's choice of them, not ours."""
        return self.num_targets > self.num_out_of_reach


T = TypeVar("T")


class Once(Generic[T]):
    """What ``make`` makes, when first asked; functools.cache takes longer to set up than that."""

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: T | None = None

    def __call__(self) -> T:
        if self._made is None:
            self._made = self._make()
        return self._made


@dataclass(frozen=True, slots=True)
class Decision:
    """What to run, and what was expected of it and of the alternatives."""

    order: Order
    seq: int  #: of its policy, or of the one in force
    report_seq: int  #: of the report that it follows from
    make_policy: Callable[[], Policy]  #: worked out when asked: few are sent
    lengths: I64  #: [B], what it means for the batch last reported
    chosen: Expected
    none: Expected  #: length 0 for all
    static: Callable[[], Expected]  #: the engine's own length for all; worked out when asked
    gain_std: Callable[[], dict[Arm, float]]  #: of log(goodput / alternative's), as models know it
    mode: str = RAGGED  #: execution mode chosen
    is_news: bool = True  #: False: the policy last told does as well, and none need be sent
    is_comparable: bool = True  #: False: lengths are bent by targets, or the models being seeded
    prompts: float = 0.0  #: tokens that the seconds of the step's prompts would be worth

    @property
    def policy(self) -> Policy:
        """What the engine is told."""
        return self.make_policy()

    @property
    def goodput(self) -> float:
        return self.chosen.goodput

    def compared(self) -> dict[Arm, float]:
        """Tokens per second of each arm, the prompts that a step takes along counted.

        At what their seconds are worth (docs/adr/0005-price-of-time.md): by tokens of answers alone
        long drafts look good that keep prompts waiting.
        """
        arms = {Arm.SMARTSPEC: self.chosen, Arm.NONE: self.none, Arm.OWN: self.static()}
        return {arm: (one.tokens + self.prompts) / one.seconds for arm, one in arms.items()}


def in_words(optimum: Optimum, none: float, num_waiting: int, by_confidence: bool) -> str:
    """Why these lengths, in a line; ``none`` is the goodput of no speculation."""
    lengths = optimum.choice.lengths.tolist()
    load = f"{len(lengths)} running" + (f", {num_waiting} waiting" if num_waiting else "")
    least, top = min(lengths, default=0), max(lengths, default=0)
    if by_confidence:
        what = "as many drafts as their confidences pay for"
        what += f"; without them lengths {least}-{top}"
    elif top == 0:
        what = "no speculation: drafts would cost more than they bring"
    elif least == top:
        what = f"length {top} for all"
    else:
        what = f"lengths {least}-{top} (mean {sum(lengths) / len(lengths):.1f})"
    gain = optimum.goodput / none - 1 if none > 0 else 0.0
    return f"{load}: {what}; {optimum.goodput:.0f} tok/s, {gain:+.0%} over none"
