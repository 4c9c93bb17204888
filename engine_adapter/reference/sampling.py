"""Draw tokens as a function of (context, seed, position), so that speculation cannot change them.

A token is the winner of a race: token v of probability p_v finishes at ``E_v / p_v`` with E_v
exponential, and the first is v with probability p_v exactly (the Gumbel-max trick, in another
scale). The E_v come from a counter-based hash of (seed, position, v) and not from a generator's
state. So the token at a position is fixed by its context, whoever computes it, in whatever batch
and order: a draft is right if and only if it is the token that the target draws there, and
output under any drafts equals output without, token for token.

A draft model that draws with the same noise from a similar distribution often draws the same
token: with probability at least (1 - d) / (1 + d), d the total variation distance (Daliri et al.
2025, "Coupling without communication and drafter-invariant speculative decoding"); rejection
sampling (Leviathan et al. 2023; Chen et al. 2023) has 1 - d. benchmarks/bench_coupling.py measures
both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smartspec.engine_adapter.base import U64
from smartspec.engine_adapter.reference.events import TokenLogprobs
from smartspec.engine_adapter.reference.sequence import SamplingParams

# Weyl constant and finaliser of SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit numbers.
_WEYL = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64

#: Likeliest tokens looked at for top-p at first; 16 times more when they do not reach it.
NUM_CANDIDATES = 256
#: Elements of a block of rows on the CPU: the block's noise stays in the cache.
BLOCK_ELEMENTS = 1 << 16


class Draws(NamedTuple):
    """What decides the token of each row of logits, besides the logits: columns of length M."""

    temperature: npt.NDArray[np.float64]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]
    key: npt.NDArray[np.int64]  #: hash of (seed, position)

    @classmethod
    def of(cls, rows: Iterable[tuple[SamplingParams, int, Sequence[int]]]) -> Draws:
        """From (parameters, seed, positions) of every request, a row per position."""
        temperature: list[float] = []
        top_k: list[int] = []
        top_p: list[float] = []
        seeds: list[int] = []
        positions: list[int] = []
        for params, seed, places in rows:
            count = len(places)
            temperature += [0.0 if params.greedy else params.temperature] * count
            top_k += [params.top_k] * count
            top_p += [params.top_p] * count
            seeds += [seed] * count
            positions += places
        return cls(
            np.array(temperature, np.float64),
            np.array(top_k, np.int64),
            np.array(top_p, np.float64),
            hash_key(np.array(seeds, np.uint64), np.array(positions, np.uint64)),
        )

    def rows(self, index: npt.NDArray[np.intp]) -> Draws:
        return Draws(self.temperature[index], self.top_k[index], self.top_p[index], self.key[index])


#: Of rows of logits and the tokens of their columns: tokens, and when each comes in.
Race: TypeAlias = Callable[[Tensor, Draws, Tensor], tuple[Tensor, Tensor]]


def hash_key(seed: U64, position: U64) -> npt.NDArray[np.int64]:
    """Hash of (seed, position), [M] int64: where a position's stream of noise begins."""
    return _mix64(_mix64(seed) + position * np.uint64(_WEYL % 2**64)).view(np.int64)


def _mix64(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1 % 2**64)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2 % 2**64)
    return x ^ (x >> np.uint64(31))


def exponential_noise(key: Tensor, token_ids: Tensor) -> Tensor:
    """Standard exponential noise of each (key, token): integer arithmetic up to the last step.

    Parameters: ``key`` [M] int64; ``token_ids`` [M or 1, C] int64. Returns [M, C] float32, from
    32 random bits each: probabilities below some 2^-32 are not resolved.
    """
    x = token_ids * _WEYL + key[:, None]
    # Shifts are arithmetic here: as good a mixer, and one operation less than logical ones.
    x ^= x >> 30
    x *= _MIX_1
    x ^= x >> 27
    x *= _MIX_2
    x ^= x >> 31
    uniform = (x & 0xFFFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()


@torch.inference_mode()
def sample(logits: Tensor, draws: Draws) -> Tensor:
    """One token per row of ``logits`` [M, V]: the likeliest at temperature 0, else drawn. [M]."""
    if not (draws.temperature > 0).any():
        return logits.argmax(-1)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    every = torch.arange(logits.shape[1], device=logits.device)
    for index, race in _races(draws):
        places = torch.from_numpy(index).to(logits.device)
        if race is None:
            tokens[places] = logits[places].argmax(-1)
            continue
        block = len(index)
        if logits.device.type == "cpu":
            block = max(1, BLOCK_ELEMENTS // logits.shape[1])
        for begin in range(0, len(index), block):
            part = places[begin : begin + block]
            token, time = race(logits[part], draws.rows(index[begin : begin + block]), every)
            first = time.argmin(-1, keepdim=True)
            tokens[part] = token.expand_as(time).gather(-1, first)[:, 0]
    return tokens


@torch.inference_mode()
def likeliest(
    logits: Tensor, draws: Draws, count: int, token_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens that a target like this model would draw, likeliest first, and their chances.

    If the target's logits are this model's plus independent standard Gumbel errors, it draws v
    with probability softmax(logits - t log E)_v at temperature t: the noise E is known, since it is
    the same (at t = 0 it drops out). Of top-k and top-p what this model keeps counts.

    ``token_ids`` : [V], of the columns of ``logits``; None: 0, 1, 2, ...

    Returns [M, count] each, chances falling along a row; those of tokens left out are 0.
    """
    every = token_ids
    if every is None:
        every = torch.arange(logits.shape[1], device=logits.device)
    tokens = torch.empty((len(logits), count), dtype=torch.int64, device=logits.device)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    chances = torch.empty((len(logits), count), dtype=wide.dtype, device=logits.device)
    for index, race in _races(draws):
        places = torch.from_numpy(index).to(logits.device)
        score = wide[places]
        token = every[None]
        if race is not None:
            token, time = race(score, draws.rows(index), every)
            temperature = torch.from_numpy(draws.temperature[index]).to(score)
            score = -temperature[:, None] * time.to(score.dtype).log()
        chance, best = score.softmax(-1).topk(count, -1)
        tokens[places] = token.expand_as(score).gather(-1, best)
        chances[places] = chance
    return tokens, chances


def _races(draws: Draws) -> Iterator[tuple[npt.NDArray[np.intp], Race | None]]:
    """Rows by how their token is found, where there are any; None: it is the likeliest."""
    hot = draws.temperature > 0
    narrowed = hot & ((draws.top_k > 0) | (draws.top_p < 1))
    found: tuple[tuple[npt.NDArray[np.bool_], Race | None], ...] = (
        (~hot, None), (hot & ~narrowed, _race_of_all), (narrowed, _race_of_likeliest)
    )  # fmt: skip
    for chosen, race in found:
        if chosen.any():
            yield np.flatnonzero(chosen), race


def _probabilities(logits: Tensor, draws: Draws) -> Tensor:
    temperature = torch.from_numpy(draws.temperature).to(logits.device)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide / temperature.to(wide.dtype)[:, None]).softmax(-1)


def _race_of_all(logits: Tensor, draws: Draws, every: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [1, V] and their times [M, V]; those of the functions below are of this kind."""
    key = torch.from_numpy(draws.key).to(logits.device)
    return every[None], exponential_noise(key, every[None]) / _probabilities(logits, draws)


def _race_of_likeliest(logits: Tensor, draws: Draws, every: Tensor) -> tuple[Tensor, Tensor]:
    """Top-k, then top-p on what is left, renormalised; only the candidates need noise."""
    size = logits.shape[1]
    probabilities = _probabilities(logits, draws)
    key = torch.from_numpy(draws.key).to(logits.device)
    top_p = torch.from_numpy(draws.top_p).to(logits.device)[:, None]
    limits = np.where(draws.top_k > 0, draws.top_k, size)
    limit = torch.from_numpy(limits).to(logits.device)[:, None]
    count = min(size, max(NUM_CANDIDATES, int(draws.top_k.max())))
    while True:
        value, place = probabilities.topk(count, -1)
        value = value.masked_fill(torch.arange(count, device=value.device) >= limit, 0.0)
        mass = value.cumsum(-1)
        total = torch.where(limit < size, mass[:, -1:], 1.0)
        if count == size or bool(((limit <= count) | (mass[:, -1:] >= top_p * total)).all()):
            break
        count = min(size, 16 * count)
    kept = (mass - value < top_p * total) | (top_p >= 1)  # always the first; at 1, all of them
    token = every[place]
    return token, exponential_noise(key, token) / torch.where(kept, value, 0.0)


@torch.inference_mode()
def token_logprobs(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of ``tokens`` [M] and of the ``num_top`` likeliest, from logits [M, V].

    Those of the model's own distribution: before temperature, top-p and top-k.
    """
    scores = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    chosen = scores.gather(-1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    values, ids = scores.topk(min(num_top, scores.shape[1]), -1)
    tops = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(token, score, list(zip(*top, strict=True)))
        for token, score, top in zip(tokens, chosen, tops, strict=True)
    ]
