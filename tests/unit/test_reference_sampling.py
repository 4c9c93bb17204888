"""Tokens follow the target's distribution exactly, and depend on (context, seed, position) only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from smartspec.engine_adapter.reference import sampling
from smartspec.engine_adapter.reference.sampling import (
    Draws,
    exponential_noise,
    hash_key,
    likeliest,
    sample,
)
from smartspec.engine_adapter.reference.sequence import SamplingParams

F64 = npt.NDArray[np.float64]
NUM_DRAWS = 40_000


def exact_probabilities(logits: F64, params: SamplingParams) -> F64:
    """The definition, one token after the other: temperature, then top-k, then top-p."""
    weights = np.exp((logits - logits.max()) / params.temperature)
    p = weights / weights.sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if params.top_k:
        order = order[: params.top_k]
    total = sum(p[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += p[i] / total
        if mass >= params.top_p:
            break
    result = np.zeros_like(p)
    result[kept] = p[kept]
    return result / result.sum()


def draw(
    logits: F64, params: SamplingParams, seeds: range, position: int = 5
) -> npt.NDArray[np.int64]:
    rows = torch.from_numpy(logits).expand(len(seeds), -1)
    draws = Draws.of((params, seed, range(5, 6)) for seed in seeds)
    return sample(rows, draws).numpy()


def chi_square_p(tokens: npt.NDArray[np.int64], expected: F64) -> float:
    counts = np.bincount(tokens, minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    support = expected > 0
    if support.sum() == 1:
        return 1.0
    return float(stats.chisquare(counts[support], expected[support] * len(tokens)).pvalue)


PARAMETERS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.0),
    SamplingParams(temperature=1.0, top_k=4),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=0.7, top_k=6, top_p=0.9),
]


@pytest.mark.parametrize("params", PARAMETERS, ids=str)
def test_distribution_is_exact_when_seeds_vary(params: SamplingParams) -> None:
    logits = np.random.default_rng(1).normal(size=12) * 1.5
    tokens = draw(logits, params, range(NUM_DRAWS))
    assert chi_square_p(tokens, exact_probabilities(logits, params)) > 1e-3


def test_distribution_is_exact_when_positions_vary() -> None:
    params = SamplingParams(temperature=1.0)
    logits = np.random.default_rng(2).normal(size=10)
    rows = torch.from_numpy(logits).expand(NUM_DRAWS, -1)
    tokens = sample(rows, Draws.of([(params, 42, range(NUM_DRAWS))])).numpy()
    assert chi_square_p(tokens, exact_probabilities(logits, params)) > 1e-3
    # Neighbouring positions are independent.
    pairs = np.zeros((10, 10))
    np.add.at(pairs, (tokens[:-1:2], tokens[1::2]), 1)
    assert stats.chi2_contingency(pairs).pvalue > 1e-3


def test_chi_square_notices_when_the_distribution_is_slightly_wrong() -> None:
    logits = np.random.default_rng(1).normal(size=12) * 1.5
    tokens = draw(logits, SamplingParams(temperature=1.1), range(NUM_DRAWS))
    exact = exact_probabilities(logits, SamplingParams(temperature=1.0))
    assert chi_square_p(tokens, exact) < 1e-3


def test_distribution_is_exact_when_the_nucleus_is_wider_than_the_candidates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "NUM_CANDIDATES", 1)
    params = SamplingParams(temperature=2.0, top_p=0.95)
    logits = np.random.default_rng(3).normal(size=40)
    tokens = draw(logits, params, range(NUM_DRAWS))
    assert chi_square_p(tokens, exact_probabilities(logits, params)) > 1e-3


def test_noise_is_standard_exponential() -> None:
    keys = torch.from_numpy(hash_key(np.arange(200, dtype=np.uint64), np.full(200, 9, np.uint64)))
    noise = exponential_noise(keys, torch.arange(500)[None]).numpy()
    assert stats.kstest(noise.ravel(), "expon").pvalue > 1e-3
    # Independent from token to token and from key to key.
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.01


def test_noise_is_the_documented_hash() -> None:
    mask = 2**64 - 1

    def mix(x: int, arithmetic: bool) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            signed = x - 2**64 if arithmetic and x >> 63 else x
            x = ((x ^ (signed >> shift)) & mask) * factor & mask
        return x

    key = mix((mix(12, False) + 34 * 0x9E3779B97F4A7C15) & mask, False)
    low = mix((key + 56 * 0x9E3779B97F4A7C15) & mask, True) & 0xFFFFFFFF
    found = exponential_noise(
        torch.from_numpy(hash_key(np.array([12], np.uint64), np.array([34], np.uint64))),
        torch.tensor([[56]]),
    )
    assert found.item() == pytest.approx(-np.log1p(-(low + 0.5) / 2**32), rel=1e-5)


def test_token_is_the_same_when_rows_are_drawn_in_other_company() -> None:
    logits = torch.from_numpy(np.random.default_rng(4).normal(size=(30, 64)) * 2)
    kinds = [SamplingParams(), *PARAMETERS]
    rows = [(kinds[i % len(kinds)], i, range(i, i + 1)) for i in range(30)]
    together = sample(logits, Draws.of(rows)).tolist()
    alone = [sample(logits[i : i + 1], Draws.of([rows[i]])).item() for i in range(30)]
    backwards = sample(logits.flip(0), Draws.of(rows[::-1])).flip(0).tolist()
    assert together == alone == backwards


def test_token_is_the_likeliest_when_greedy_or_top_k_is_one() -> None:
    logits = torch.from_numpy(np.random.default_rng(5).normal(size=(20, 64)))
    best = logits.argmax(-1).tolist()
    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_k=1)):
        rows = [(params, i, range(1)) for i in range(20)]
        assert sample(logits, Draws.of(rows)).tolist() == best


def test_tokens_differ_when_the_seed_differs() -> None:
    logits = np.zeros(64)
    assert len(set(draw(logits, SamplingParams(temperature=1.0), range(50)).tolist())) > 20


@pytest.mark.parametrize("params", [SamplingParams(), *PARAMETERS], ids=str)
def test_likeliest_token_is_the_one_that_is_drawn(params: SamplingParams) -> None:
    logits = torch.from_numpy(np.random.default_rng(8).normal(size=(40, 30)) * 2)
    draws = Draws.of((params, i, [i + 3]) for i in range(40))
    tokens, chances = likeliest(logits, draws, 5)
    assert tokens[:, 0].tolist() == sample(logits, draws).tolist()
    assert bool((chances[:, 1:] <= chances[:, :-1]).all())
    assert bool((chances.sum(1) <= 1 + 1e-6).all())


@pytest.mark.parametrize(
    "params", [SamplingParams(), *(SamplingParams(temperature=t) for t in (0.5, 1.0, 1.7))], ids=str
)
def test_chances_are_those_of_a_target_whose_logits_differ_by_gumbel_errors(
    params: SamplingParams,
) -> None:
    rng = np.random.default_rng(9)
    logits = rng.normal(size=8) * 2
    rows = [(params, 4, [6])] * NUM_DRAWS  # one position: its noise is known
    tokens, chances = likeliest(torch.from_numpy(logits)[None], Draws.of(rows[:1]), 8)
    expected = np.zeros(8)
    expected[tokens[0].numpy()] = chances[0].numpy()
    targets = torch.from_numpy(logits + rng.gumbel(size=(NUM_DRAWS, 8)))
    drawn = sample(targets, Draws.of(rows)).numpy()
    assert chi_square_p(drawn, expected / expected.sum()) > 1e-3


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_parameters_are_refused_when_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]
