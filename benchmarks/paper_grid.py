"""What bench_paper.py is to run, read from paper.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

PATH = Path(__file__).parent / "paper.toml"
FULL = 0.0  #: stands for the load of a queue that is full from the beginning

Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(gt=0, lt=1)]
Count = Annotated[int, Meta(ge=1)]


class Requests(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is asked of an engine: exponential lengths, and how drafts fare."""

    acceptance: Share  #: mean over requests
    mean_prompt: Positive
    mean_output: Positive
    presence: Annotated[float, Meta(gt=0, le=1)] = 1.0  #: how often a lookup finds a draft


class Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A target on its GPUs, and who drafts for it."""

    profile: str
    draft: str
    max_num_running: Count
    duration_s: Positive  #: in which requests come; a run ends when all are served
    traffic: tuple[str, ...]
    #: of trees: fixed numbers of nodes, rising, the last the most that there may be; none: chains
    tree_sizes: tuple[Count, ...] = ()


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """A pair with a traffic, and all else that its runs depend on."""

    pair_name: str
    traffic_name: str
    pair: Pair
    requests: Requests
    num_seeds: int
    max_length: int
    concentration: float
    loads: tuple[float, ...]
    static_loads: tuple[float, ...]
    rivals: tuple[str, ...]
    tree_rivals: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.pair_name}.{self.traffic_name}"

    @property
    def all_loads(self) -> tuple[float, ...]:
        """In the order in which they are run."""
        return (*self.loads, FULL, *self.static_loads)

    @property
    def longest(self) -> int:
        """Longest length; of trees, most nodes."""
        return self.pair.tree_sizes[-1] if self.pair.tree_sizes else self.max_length

    @property
    def statics(self) -> tuple[str, ...]:
        """Policies that know one length."""
        lengths = self.pair.tree_sizes or range(1, self.max_length + 1)
        return ("none", *(f"static{k}" for k in lengths))

    @property
    def others(self) -> tuple[str, ...]:
        """Further policies; "chain3" where drafts are trees: the first guesses, three in a row."""
        if not self.pair.tree_sizes:
            return self.rivals
        return (*(f"chain{k}" for k in range(1, self.max_length + 1)), *self.tree_rivals)


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    num_seeds: Annotated[int, Meta(ge=2)]
    max_length: Annotated[int, Meta(ge=1, le=16)]
    concentration: Positive
    loads: tuple[Positive, ...]
    static_loads: tuple[Positive, ...]
    rivals: tuple[str, ...]
    tree_rivals: tuple[str, ...]  #: where drafts are trees
    traffic: dict[str, Requests]
    pairs: dict[str, Pair]

    def settings(self) -> list[Setting]:
        """Pairs with their traffics, in the file's order."""
        return [
            Setting(
                pair_name=pair_name,
                traffic_name=name,
                pair=pair,
                requests=self.traffic[name],
                num_seeds=self.num_seeds,
                max_length=self.max_length,
                concentration=self.concentration,
                loads=self.loads,
                static_loads=self.static_loads,
                rivals=self.rivals,
                tree_rivals=self.tree_rivals,
            )
            for pair_name, pair in self.pairs.items()
            for name in pair.traffic
        ]


def read(path: Path = PATH) -> Grid:
    """The grid. Raises ValueError naming what is wrong."""
    try:
        grid = msgspec.toml.decode(path.read_bytes(), type=Grid)
    except (msgspec.DecodeError, OSError) as error:
        raise ValueError(f"{path.name}: {error}") from error
    for name, pair in grid.pairs.items():
        for traffic in pair.traffic:
            if traffic not in grid.traffic:
                known = ", ".join(grid.traffic)
                raise ValueError(f"{path.name}: pairs.{name}: no traffic {traffic!r} of {known}")
    return grid
