"""What is learned as a frame: what comes back, and what is refused, by its reason."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import step_report
from hypothesis import given, settings
from hypothesis import strategies as st
from learned_state import CHECKPOINT, ENGINE, FRAME, experienced
from scripted_engine import hello

from smartspec.daemon.engines import Engine
from smartspec.daemon.state import learned
from smartspec.daemon.state.learned import Checkpoint, ModelKey, RefusedState, check, decode, encode
from smartspec.daemon.state.library import Library
from smartspec.engine_adapter.messages import BucketAxis, Fingerprint
from smartspec.engine_adapter.simulator import profile
from smartspec.engine_adapter.simulator.profile import Chunk
from smartspec.estimators.step_cost import StepShape


def changed(**fields: Any) -> Checkpoint:
    return msgspec.structs.replace(CHECKPOINT, **fields)


def test_frame_gives_back_what_was_learned_but_no_requests() -> None:
    checkpoint = decode(FRAME, ENGINE.key.id)
    check(checkpoint)
    restored = learned.restore(checkpoint)
    assert restored.is_warm and restored.num_steps == 150
    hazards = restored.acceptance.pooled_hazards()
    assert hazards.tolist() == ENGINE.acceptance.pooled_hazards().tolist()
    assert restored.step_cost.state() == ENGINE.step_cost.state()
    rows = restored.acceptance.rows([1, 2, 3])
    assert restored.acceptance.corrections(rows).tolist() == [1.0] * 3
    assert len(FRAME) < 64_000


def test_key_is_named_as_ever() -> None:
    """Golden: with other names, no release would find what the one before has stored."""
    assert ModelKey.of(hello()).id == "f5bd4b0e760a2f7b-2b58a74d"


def test_key_differs_in_shape_only_when_limits_do() -> None:
    one, other = experienced(1).key, experienced(1, max_length=4).key
    assert one.id.partition("-")[0] == other.id.partition("-")[0]
    assert one.id != other.id
    assert one.differences(other) == "max_length 5, now 4"


@settings(max_examples=200)
@given(st.integers(0, len(FRAME) - 1))
def test_frame_is_refused_when_cut_short(length: int) -> None:
    with pytest.raises(RefusedState, match=r"\S"):
        decode(FRAME[:length], ENGINE.key.id)


@settings(max_examples=400)
@given(st.integers(0, 8 * len(FRAME) - 1))
def test_frame_is_refused_or_the_same_when_a_bit_flips(bit: int) -> None:
    damaged = bytearray(FRAME)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        assert decode(bytes(damaged), ENGINE.key.id) == CHECKPOINT
    except RefusedState:
        pass


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_anything_else_is_refused(frame: bytes) -> None:
    with pytest.raises(RefusedState):
        decode(frame)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"version": 3}, "version 3, of a newer release: version 2 is read here"),
        ({"version": 3, "body": None, "digest": None}, "newer release"),
        ({"version": 0}, "version 0, of another release"),
        ({"format": "someone else's"}, "no format"),
        ({"digest": bytes(32)}, "digest does not match"),
    ],
)
def test_frame_is_refused_by_name_when_its_head_is_of_another(
    fields: dict[str, Any], why: str
) -> None:
    frame = msgspec.msgpack.encode(msgspec.msgpack.decode(FRAME) | fields)
    with pytest.raises(RefusedState, match=why):
        decode(frame)


def test_frame_is_refused_when_too_large_or_of_another_name() -> None:
    with pytest.raises(RefusedState, match="larger than"):
        decode(bytes(learned.MAX_BYTES + 1))
    with pytest.raises(RefusedState, match="of another fingerprint or shape"):
        decode(FRAME, "0" * 16 + "-" + "0" * 8)


def packed(values: Any) -> dict[str, Any]:
    array = np.asarray(values, "<f8")
    return {"shape": list(array.shape), "data": array.tobytes()}


COUNTS = np.frombuffer(CHECKPOINT.acceptance["counts"]["data"]).reshape(
    CHECKPOINT.acceptance["counts"]["shape"]
)
COST = CHECKPOINT.step_cost
SOLVER = COST["solver"]
SIZE = SOLVER["coef"]["shape"][0]

STRANGERS: dict[str, Checkpoint] = {
    "params of another model": changed(
        acceptance=CHECKPOINT.acceptance
        | {"params": CHECKPOINT.acceptance["params"] | {"max_requests": 10**12}}
    ),
    "no params": changed(step_cost={k: v for k, v in COST.items() if k != "params"}),
    "another estimator": changed(step_cost=COST | {"kind": "Oracle"}),
    "not a state": changed(step_cost={}),
    "counts not finite": changed(
        acceptance=CHECKPOINT.acceptance | {"counts": packed(COUNTS * np.nan)}
    ),
    "counts negative": changed(acceptance=CHECKPOINT.acceptance | {"counts": packed(-COUNTS - 1)}),
    "counts above the window": changed(
        acceptance=CHECKPOINT.acceptance | {"counts": packed(COUNTS + 1e9)}
    ),
    "counts of another shape": changed(
        acceptance=CHECKPOINT.acceptance | {"counts": packed(COUNTS[:1])}
    ),
    "more accepted than reached": changed(
        acceptance=CHECKPOINT.acceptance | {"counts": packed(COUNTS[::-1] + [[[0]], [[5]]])}
    ),
    "coefficients beyond all steps": changed(
        step_cost=COST | {"solver": SOLVER | {"coef": packed(np.full(SIZE, 1e300))}}
    ),
    "precision not positive": changed(
        step_cost=COST | {"solver": SOLVER | {"precision": packed(-np.eye(SIZE))}}
    ),
    "solver not a map": changed(step_cost=COST | {"solver": [1, 2]}),
    "counts beyond integers": changed(step_cost=COST | {"counts": [[2**64 - 1] * 2] * 6}),
    "buckets of another release": changed(
        key=msgspec.structs.replace(
            CHECKPOINT.key, axes=(BucketAxis(feature="match_length", edges=(1.0, 2.0)),)
        )
    ),
    "buckets beyond memory": changed(
        key=msgspec.structs.replace(
            CHECKPOINT.key, axes=(BucketAxis(feature="match_length", edges=(3.0, 5.0, 8.0)),) * 40
        )
    ),
    "graph sizes that fall": changed(
        key=msgspec.structs.replace(CHECKPOINT.key, graph_sizes=(8, 4))
    ),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_state_is_refused_when_a_stranger_wrote_it(what: str) -> None:
    frame = encode(STRANGERS[what])  # its digest is right
    checkpoint = decode(frame)
    with pytest.raises(RefusedState, match=r"\S"):
        check(checkpoint)


@settings(max_examples=100)
@given(st.data())
def test_state_is_refused_or_works_when_its_numbers_are_others(data: st.DataObject) -> None:
    """Whatever passes the check can be steered by: it neither fails nor leaves its ranges."""
    name = data.draw(st.sampled_from(("moment", "coef", "covariance", "precision", "prior")))
    values = np.frombuffer(SOLVER[name]["data"]).reshape(SOLVER[name]["shape"]).copy()
    at = data.draw(st.integers(0, values.size - 1))
    values.flat[at] = data.draw(st.floats(allow_nan=False, width=64))
    checkpoint = changed(step_cost=COST | {"solver": SOLVER | {name: packed(values)}})
    try:
        check(checkpoint)
    except RefusedState:
        return
    engine = Engine(hello(), lend=lambda key: learned.restore(checkpoint))
    for seq in range(1, 6):
        predicted_s = engine.learn(engine.observe(step_report(seq, roster=seq == 1)))
        assert predicted_s is not None and predicted_s > 0.0


# -- the library ----------------------------------------------------------------------------------


def test_library_lends_models_of_their_own() -> None:
    library = Library()
    library.put(CHECKPOINT)
    first, second = library.find(ENGINE.key), library.find(ENGINE.key)
    assert first is not None and second is not None
    assert first[0].acceptance is not second[0].acceptance
    assert first[1] == CHECKPOINT


def test_library_says_why_nothing_fits() -> None:
    library = Library()
    other = experienced(1, max_length=4).key
    assert library.find(ENGINE.key) is None and library.why_not(ENGINE.key) is None
    library.put(CHECKPOINT)
    assert library.find(other) is None
    assert library.why_not(other) == "what was stored is of other limits: max_length 5, now 4"
    library.note_refused(other.id, "damaged")
    assert library.why_not(other) == "what was stored was refused: damaged"


def test_library_forgets_the_oldest() -> None:
    library = Library(max_kept=2)
    for target in ("a", "b", "c"):
        fingerprint = Fingerprint(target=target, proposer="lookup")
        key = msgspec.structs.replace(CHECKPOINT.key, fingerprint=fingerprint)
        library.put(changed(key=key))
    assert len(library) == 2
    assert (
        library.find(
            msgspec.structs.replace(key, fingerprint=Fingerprint(target="a", proposer="lookup"))
        )
        is None
    )


@pytest.mark.parametrize(
    ("name", "budget", "size", "drafted"),
    # On an A100 time goes up in stairs of 64 tokens, and drafts come on top of the last of them.
    [("h100_8b", 1024, (60, 200), (0.0, 1.0)), ("a100_7b", 512, (30, 70), (1.6, 2.4))],
)
def test_price_of_a_draft_is_learned_when_prompts_fill_the_pass(
    name: str, budget: int, size: tuple[int, int], drafted: tuple[float, float]
) -> None:
    gpu = profile.load(name)
    rng = np.random.default_rng(0)
    model = learned.Learned.new(ModelKey.of(hello(lookup=False))).step_cost
    for step in range(1500):
        batch = int(rng.integers(*size))
        verify = batch + int(batch * rng.uniform(*drafted))
        # A third of the passes are full, a third carry the end of a prompt, a third none.
        prompt = (0, int(rng.integers(100, budget - batch)), budget - batch)[step % 3]
        chunks = (Chunk(prompt, 0),) if prompt else ()
        seconds = gpu.target_seconds(batch, verify, 700 * batch, chunks)
        shape = StepShape(batch, verify, prompt, 700 * batch)
        noisy = seconds * (1 + 0.02 * rng.standard_normal())
        model.observe(shape, noisy, 0.0, noisy)
    batch = sum(size) // 2
    ends = [budget + round(batch * share) for share in (0.05, drafted[1])]
    low, high = model.target_curve(StepShape(batch, batch, 0, 700 * batch), ends)
    truth = gpu.dense(ends[1]) - gpu.dense(ends[0]) + gpu.row_s * (ends[1] - ends[0])
    assert high - low == pytest.approx(truth, rel=0.15)


# -- what two daemons have learned --------------------------------------------------------------


def taught(batch: int, acceptance: float, steps: int, seed: int = 0) -> Checkpoint:
    """What an engine of some known costs and acceptance has taught, at one size of batch."""
    rng = np.random.default_rng(seed)
    models = Engine(hello(lookup=False)).learned
    rows = models.acceptance.rows(range(1, batch + 1))
    for _ in range(steps):
        drafted = rng.integers(0, models.key.max_length + 1, batch)
        passed = rng.random((batch, models.key.max_length)) < acceptance
        accepted = np.minimum(np.cumprod(passed, axis=1).sum(axis=1), drafted)
        models.acceptance.learn_many(rows, np.zeros(batch, np.int64), drafted, accepted)
        tokens = batch + int(drafted.sum())
        shape = StepShape(batch, tokens, draft_forwards=int(drafted.max()))
        models.step_cost.observe(shape, None, None, seconds(tokens) * (1 + 0.02 * rng.normal()))
    models.num_steps = models.num_steered = steps
    return models.checkpoint(f"of {batch}", 1e9 + steps)


def seconds(tokens: int) -> float:
    return 0.01 + 0.0002 * tokens + 0.004 * max(0, tokens - 64)


def error(checkpoint: Checkpoint, batch: int, tokens: int) -> float:
    """Of the cost of a step, as a share of it."""
    predicted = learned.restore(checkpoint).step_cost.seconds(StepShape(batch, tokens, 0, 0, 1))
    return abs(predicted / seconds(tokens) - 1)


def test_merged_state_knows_what_either_knew() -> None:
    small, large = taught(4, 0.9, 300), taught(48, 0.3, 200)
    assert error(small, 4, 12) < 0.05 and error(small, 48, 150) > 0.3
    for both in (learned.merge(small, large), learned.merge(large, small)):
        check(both)
        assert error(both, 4, 12) < 0.1 and error(both, 48, 150) < 0.1
        assert (both.num_steps, both.engine, both.saved_s) == (300, "of 4", 1e9 + 300)
    hazards = [learned.restore(c).acceptance.pooled_hazards()[0] for c in (small, both, large)]
    assert hazards[0] > hazards[1] + 0.1 > hazards[2] + 0.2


def test_merging_again_adds_no_evidence() -> None:
    """One may have started from the other: what both know must not be counted twice."""
    one, other = taught(4, 0.9, 60), taught(4, 0.3, 40, seed=1)
    most = np.maximum(*(learned.restore(c).acceptance.num_observed() for c in (one, other)))
    both = learned.merge(one, other)
    echo = both
    for _ in range(20):
        echo = learned.merge(echo, both)
    alone = [learned.restore(c).step_cost for c in (one, other)]
    first, last = learned.restore(both), learned.restore(echo)
    assert np.allclose(first.acceptance.num_observed(), most)
    assert np.allclose(last.acceptance.num_observed(), most)
    assert np.allclose(last.acceptance.hazards(), first.acceptance.hazards(), atol=1e-6)
    shape = StepShape(4, 12, 0, 0, 1)
    assert last.step_cost.seconds(shape) == pytest.approx(first.step_cost.seconds(shape), rel=1e-6)
    assert last.step_cost.std(shape) == pytest.approx(first.step_cost.std(shape), rel=1e-6)
    assert first.step_cost.std(shape) > 0.9 * min(model.std(shape) for model in alone)


def test_what_one_alone_knows_stays_when_the_other_writes_again_and_again() -> None:
    small, large = taught(4, 0.9, 300), taught(48, 0.3, 200)
    kept = small
    for _ in range(50):
        kept = learned.merge(large, kept)
    assert error(kept, 4, 12) < 0.1 and error(kept, 48, 150) < 0.1


def test_state_of_other_limits_is_not_merged() -> None:
    with pytest.raises(RefusedState, match="max_length 5, now 4"):
        learned.merge(CHECKPOINT, experienced(max_length=4).learned.checkpoint())
