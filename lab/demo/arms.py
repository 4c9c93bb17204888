"""What is compared: who decides the speculation lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arm:
    """``length``: the static length for all; None: SmartSpec decides.

    ``proposer`` : of the worker that plays it, as `smartspec worker` knows it
    """

    name: str
    title: str
    why: str
    length: int | None
    proposer: str = "lookup"


ARMS = (
    Arm("none", "no speculation", "set to length 0", 0),
    Arm("static_3", "static length 3", "set to length 3", 3),
    Arm("static_5", "static length 5", "set to length 5", 5),
    Arm("smartspec", "SmartSpec", "", None),
)

NAMES = tuple(arm.name for arm in ARMS)


def named(names: Sequence[str]) -> list[Arm]:
    """The arms of these names, each once, in the order given. Raises ValueError."""
    known = {arm.name: arm for arm in ARMS}
    for name in names:
        if name not in known:
            raise ValueError(f"no such arm: {name}; there are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]
