"""The benchmark's own arithmetic: what a stream's noise is where nobody knows the truth."""

from __future__ import annotations

import numpy as np
import pytest
from bench_step_cost import RECORDED, repeat_floor

from smartspec.estimators.step_cost import StepShape


def test_floor_is_the_mean_deviation_when_every_second_step_repeats_the_one_before() -> None:
    rng = np.random.default_rng(0)
    tokens = np.repeat(rng.integers(1, 400, 2000), 2)
    shapes = np.zeros((len(tokens), len(StepShape._fields)))
    shapes[:, StepShape._fields.index("verify_tokens")] = tokens
    shapes[:, StepShape._fields.index("context_tokens")] = np.arange(len(tokens))
    truth = 0.02 + 0.001 * tokens
    noise = 0.03 * rng.normal(size=len(tokens))
    floor, same = repeat_floor(shapes, truth * (1 + noise))
    assert floor == pytest.approx(np.abs(noise).mean(), rel=0.05)
    assert 2000 <= same.sum() < 2030  # some tokens are drawn twice running


def test_recorded_steps_have_a_column_for_each_count_and_take_time() -> None:
    with np.load(RECORDED) as file:
        assert {*StepShape._fields, "target_s", "draft_s", "step_s"} == set(file.files)
        assert len(file["batch"]) >= 1000
        assert (file["step_s"] >= file["target_s"]).all() and (file["target_s"] > 0).all()
