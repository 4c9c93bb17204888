"""What steps cost on a GPU: a small table of fitted coefficients, each with its source."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from smartspec.engine_adapter.lengths import RAGGED, CostCurve, DraftCost

FOLDER = Path(__file__).parent / "profiles"


class Chunk(NamedTuple):
    """A part of a prompt, processed in one step."""

    num_tokens: int
    num_before: int  #: tokens of the prompt that were processed in earlier steps


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a term comes from."""

    term: str
    label: str  #: "measured", "scaled", "extrapolated" or "datasheet"
    note: str


class Draft(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A drafter: ``fixed + forward * depth + token * tokens`` seconds; 0 without drafts."""

    fixed_s: float
    forward_s: float
    token_s: float
    note: str


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """Seconds of a step are the sum of

    * dense layers, by tokens in the pass padded to ``graph_sizes`` (if any): a table, and beyond it
      the slope of its last two entries;
    * attention of decoding: ``fixed + request * B + context * entries``;
    * attention of each chunk: ``fixed + token * n + pair * n * (before + n / 2)``;
    * output rows (``row_s`` each) and the host (``host_s``, ``host_request_s`` per request).
    """

    name: str
    target: str
    accelerator: str
    graph_sizes: tuple[int, ...]
    dense_tokens: tuple[int, ...]
    dense_s: tuple[float, ...]
    decode_fixed_s: float
    decode_request_s: float
    decode_context_s: float
    chunk_fixed_s: float
    chunk_token_s: float
    chunk_pair_s: float
    row_s: float
    host_s: float
    host_request_s: float
    drafts: dict[str, Draft]
    max_num_running: int
    kv_tokens: int
    chunk_tokens: int
    fit_error_mean: float  #: of whole steps, relative to what was fitted
    fit_error_p95: float
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        counts = np.arange(max(self.dense_tokens[-1], *self.graph_sizes, 0) + 1)
        sizes = np.array(self.graph_sizes)
        padded = counts
        if len(sizes):
            at = np.searchsorted(sizes, counts)
            padded = np.where(at < len(sizes), sizes[np.minimum(at, len(sizes) - 1)], counts)
        seconds = np.interp(padded, self.dense_tokens, self.dense_s)
        beyond = np.maximum(padded - self.dense_tokens[-1], 0)
        self.__dict__["_dense"] = (seconds + self.last_slope * beyond).tolist()

    @property
    def last_slope(self) -> float:
        """Seconds of a token more in passes beyond the table."""
        if len(self.dense_tokens) < 2:
            return 0.0
        (n, last), (s, last_s) = self.dense_tokens[-2:], self.dense_s[-2:]
        return max(last_s - s, 0.0) / (last - n)

    def dense(self, num_tokens: int) -> float:
        """Seconds of the dense layers."""
        table: list[float] = self.__dict__["_dense"]
        if num_tokens < len(table):
            return table[num_tokens]
        return table[-1] + self.last_slope * (num_tokens - len(table) + 1)

    def beside(
        self, num_decoding: int, context_tokens: int, chunks: tuple[Chunk, ...] = ()
    ) -> float:
        """Seconds that do not depend on how much is drafted."""
        seconds = self.host_s + self.host_request_s * num_decoding
        if num_decoding:
            seconds += (
                self.decode_fixed_s
                + self.decode_request_s * num_decoding
                + self.decode_context_s * context_tokens
            )
        for n, before in chunks:
            pairs = n * (before + n / 2)
            seconds += self.chunk_fixed_s + self.chunk_token_s * n + self.chunk_pair_s * pairs
            seconds += self.row_s
        return seconds

    def target_seconds(
        self,
        num_decoding: int,
        num_verify_tokens: int,
        context_tokens: int,
        chunks: tuple[Chunk, ...] = (),
    ) -> float:
        """Seconds of a pass without drafting."""
        num_prefill = sum(chunk.num_tokens for chunk in chunks)
        return (
            self.dense(num_verify_tokens + num_prefill)
            + self.row_s * num_verify_tokens
            + self.beside(num_decoding, context_tokens, chunks)
        )

    def curve(
        self,
        num_decoding: int,
        context_tokens: int,
        chunks: tuple[Chunk, ...],
        most: int,
        factor: float = 1.0,
    ) -> CostCurve:
        """True seconds by tokens in the pass (chunks included), up to ``most``."""
        num_prefill = sum(chunk.num_tokens for chunk in chunks)
        low = num_decoding + num_prefill
        sizes = self.graph_sizes
        points = {low}
        for size in sizes[bisect_left(sizes, low) :]:
            points |= {size, size + 1}
            if size >= most:
                break
        # What is not padded bends where the table does.
        unpadded = max(low, sizes[-1] if sizes else 0)
        points |= {n for n in self.dense_tokens if unpadded < n < most}
        points.add(max(most, low + 1))
        tokens = sorted(points)
        other = self.beside(num_decoding, context_tokens, chunks)
        seconds = [
            factor * (self.dense(n) + self.row_s * (n - num_prefill) + other) for n in tokens
        ]
        return CostCurve(RAGGED, [float(n) for n in tokens], seconds)

    def draft(self, name: str, factor: float = 1.0) -> DraftCost:
        """Of the drafter called so; "lookup" costs nothing. Raises ValueError for others."""
        if name == "lookup":
            return DraftCost()
        if name not in self.drafts:
            known = ", ".join(["lookup", *self.drafts])
            raise ValueError(f"profile {self.name} has no draft {name!r}: choose of {known}")
        draft = self.drafts[name]
        return DraftCost(factor * draft.fixed_s, factor * draft.forward_s, factor * draft.token_s)


def shipped() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str | Path) -> Profile:
    """A shipped profile by name, or one from a file. Raises ValueError when there is none."""
    path = Path(name)
    if path.suffix != ".json":
        path = FOLDER / f"{name}.json"
    if not path.exists():
        raise ValueError(f"no profile {str(name)!r}: choose of {', '.join(shipped())}, or a file")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: not a profile ({error})") from error
