"""Profiles: interpolation, the readers of each format, and the machines put together from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smartspec.engine_adapter.simulator import profile
from smartspec.lab.profiles import fit, llmservingsim, vidur
from smartspec.lab.profiles.machines import MACHINES, Chunk, Step, h100_llama31_8b
from smartspec.lab.profiles.tables import Line, Surface


def test_line_goes_through_its_points_and_straight_on_outside() -> None:
    line = Line({1: 1.0, 2: 3.0, 4: 4.0})
    assert [line(x) for x in (1, 2, 3, 4, 6)] == [1.0, 3.0, 3.5, 4.0, 5.0]
    assert line(0) == 0.0  # straight on would be negative
    assert Line({5: 2.0})(100) == 2.0
    noisy = {n: 0.01 * n for n in range(1, 2048)} | {2048: 20.0}
    assert Line(noisy)(4096) == pytest.approx(40.0, rel=0.02)  # and not the last two's slope
    with pytest.raises(ValueError, match="without rows"):
        Line({})


def test_surface_is_bilinear_when_rows_have_points_of_their_own() -> None:
    surface = Surface([(1, 0, 0.0), (1, 10, 10.0), (3, 0, 2.0), (3, 20, 22.0)])
    assert surface(1, 5) == 5.0
    assert surface(2, 5) == pytest.approx(6.0)
    assert surface(5, 0) == pytest.approx(4.0)


def test_vidur_is_summed_over_layers_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mlp.csv"
    path.write_text(
        "time_stats.emb.median,time_stats.add.median,time_stats.mlp.mean,time_stats.mlp.median,"
        "num_tokens,num_tensor_parallel_workers\n"
        "1.0,0.25,9,0.5,8,1\n1.0,0.25,9,0.25,8,2\n"
    )
    assert vidur.dense_seconds(path, 1, 4)(8) == pytest.approx(1e-3 * (1.0 + 4 * 0.75))
    with pytest.raises(ValueError, match="3 tensor-parallel"):
        vidur.dense_seconds(path, 3, 4)


def test_both_generations_of_llmservingsim_are_read(tmp_path: Path) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    old.write_text(
        "layer_name,input,kv_cache,tp_size,latency(ns)\n"
        "lm_head,4,0,1,1000\nq_proj,4,0,1,500\nattn,4,0,1,9999\n"
    )
    new.write_text("layer,tokens,time_us\nembedding,4,1.0\nlayernorm,4,0.25\n")
    assert llmservingsim.whole_model(old, 2, ("attn",))(4) == pytest.approx(2e-6)
    assert llmservingsim.whole_model(old, 2, only=("lm_head",))(4) == pytest.approx(1e-6)
    assert llmservingsim.whole_model(new, 2)(4) == pytest.approx(2e-6)


def test_nothing_is_tabulated_beyond_its_source(data_dir: Path) -> None:
    pytest.importorskip("pyarrow")
    machine = h100_llama31_8b(data_dir / "profiles")
    made = fit.fit(machine, "Llama-3.1-8B", "H100", {})
    assert made.dense_tokens[-1] == 2048
    assert {one.term for one in made.sources if one.label == "extrapolated"} == {"dense", "lm_head"}
    step = Step(256, 256 * 6, 256 * 500, (Chunk(1024, 0),))
    assert machine.seconds(step) == pytest.approx(
        made.target_seconds(256, 256 * 6, 256 * 500, (profile.Chunk(1024, 0),)), rel=0.06
    )


@pytest.mark.parametrize("make", MACHINES, ids=lambda make: make.__name__)
def test_steps_cost_more_when_more_is_done_in_them(make, data_dir: Path) -> None:
    pytest.importorskip("pyarrow")
    machine = make(data_dir / "profiles")
    small = Step(4, 8, 4 * 500)
    for larger in (
        Step(4, 256, 4 * 500),
        Step(4, 8, 4 * 3000),
        Step(4, 8, 4 * 500, (Chunk(256, 0),)),
        Step(4, 8, 4 * 500, (), 3, 12),
    ):
        assert machine.seconds(small) < machine.seconds(larger) < 1.0
    assert 5e-3 < machine.seconds(Step(1, 1, 500)) < 0.1
    later = machine.seconds(Step(4, 8, 2000, (Chunk(256, 2048),)))
    assert later > machine.seconds(Step(4, 8, 2000, (Chunk(256, 0),)))
    assert {term.source for term in machine.terms} <= {"measured", "scaled", "datasheet"}
    assert np.isfinite(
        [term.seconds(Step(0, 0, 0, (Chunk(64, 0),))) for term in machine.terms]
    ).all()
