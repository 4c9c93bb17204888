"""The wire: golden bytes, version skew, hostile frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartspec.engine_adapter import messages as wire

GOLDEN = Path(__file__).parents[1] / "golden" / "wire_v1"

HELLO = wire.Hello(
    engine="gpu0",
    epoch=7,
    fingerprint=wire.Fingerprint(target="llama-3.1-8b", proposer="lookup", dtype="bf16"),
    limits=wire.Limits(
        max_length=5,
        max_num_running=64,
        static_length=3,
        features=("last_accepted_share", "match_length"),
        graph_sizes=(1, 2, 4, 8),
        drafts_known_first=True,
    ),
)
STEP = wire.StepReport(
    epoch=7,
    seq=42,
    roster_version=3,
    roster=wire.Roster(version=3, request_ids=wire.pack([10, 11], "u64")),
    step_s=0.025,
    target_s=0.02,
    draft_s=0.001,
    num_drafted=wire.pack([5, 0], "u8"),
    num_accepted=wire.pack([2, 0], "u8"),
    num_emitted=wire.pack([3, 1], "u8"),
    num_available=wire.pack([5, 0], "u8"),
    features=wire.pack([[0.4, -1.0], [6.0, 0.0]], "f32"),
    context_tokens=900,
    policy_seq=41,
    source="policy",
)
POLICY = wire.Policy(
    epoch=7,
    daemon_epoch=99,
    seq=41,
    report_seq=41,
    ttl_s=1.0,
    value_of_time=123.5,
    depth=5,
    curves=(
        wire.Curve(
            mode="ragged",
            num_tokens=(1.0, 64.0),
            seconds=(0.02, 0.05),
        ),
    ),
    max_length=2,
    log_survival=wire.pack(np.log([[0.5, 0.8], [0.25, 0.6]]), "f32"),
    axes=(wire.BucketAxis(feature="match_length", edges=(4.0,)),),
    roster_version=3,
    correction=wire.pack([1.0, 0.5], "f32"),
    fallback_batch=(1, 8),
    fallback_length=(3, 0),
    reason="2 running: lengths 0-5",
)
TREES = {  # of an engine whose drafts are trees
    "hello_trees": msgspec.structs.replace(
        HELLO, limits=msgspec.structs.replace(HELLO.limits, max_length=64, trees=True)
    ),
    "step_trees": msgspec.structs.replace(
        STEP, num_drafted=wire.pack([5, 64], "u8"), accepted_ranks=wire.pack([9, 1 << 63], "u64")
    ),
    "policy_trees": msgspec.structs.replace(POLICY, draft_forwards=(1.0, 1.75, 2.25)),
}
CONFIDENCES = {  # of an engine that cuts its drafts by their confidences
    "hello_confidences": msgspec.structs.replace(
        HELLO, limits=msgspec.structs.replace(HELLO.limits, confidences=True)
    ),
    "step_cut": msgspec.structs.replace(
        STEP, num_cut=wire.pack([3, 2], "u8"), num_cut_accepted=wire.pack([0, 1], "u8")
    ),
    "policy_by_confidence": msgspec.structs.replace(POLICY, by_confidence=True),
}
KEEPS_UP = {  # of an engine whose drafter runs a forward in every step
    "hello_keeps_up": msgspec.structs.replace(
        HELLO, limits=msgspec.structs.replace(HELLO.limits, keeps_up=True)
    ),
}
MESSAGES: dict[str, wire.Message] = {
    "hello": HELLO,
    "step": STEP,
    "goodbye": wire.Goodbye(epoch=7),
    "policy": POLICY,
    "heartbeat": wire.Heartbeat(daemon_epoch=99),
    "resync": wire.Resync(daemon_epoch=99, reason="no roster"),
    "refused": wire.Refused(daemon_epoch=99, reason="full"),
    **TREES,
    **CONFIDENCES,
    **KEEPS_UP,
}
UP = ("hello", "step", "goodbye", "hello_trees", "step_trees", "hello_confidences", "step_cut")
UP += ("hello_keeps_up",)


def decode(name: str, frame: bytes) -> Any:
    return (wire.decode_engine_message if name in UP else wire.decode_daemon_message)(frame)


@pytest.mark.parametrize("name", MESSAGES)
def test_bytes_are_those_of_version_1_when_encoded(name: str) -> None:
    golden = (GOLDEN / f"{name}.msgpack").read_bytes()
    assert wire.encode(MESSAGES[name]) == golden
    assert decode(name, golden) == MESSAGES[name]


@pytest.mark.parametrize("name", MESSAGES)
def test_newer_fields_are_skipped_when_the_peer_is_older(name: str) -> None:
    plain = msgspec.msgpack.decode(wire.encode(MESSAGES[name]))
    plain["a_field_of_tomorrow"] = {"x": [1, 2]}
    assert decode(name, msgspec.msgpack.encode(plain)) == MESSAGES[name]


def test_absent_fields_take_defaults_when_the_peer_is_older() -> None:
    required = {"type", "epoch", "seq", "roster_version", "step_s"}
    plain = msgspec.msgpack.decode(wire.encode(STEP))
    report = wire.decode_engine_message(
        msgspec.msgpack.encode({k: v for k, v in plain.items() if k in required})
    )
    assert isinstance(report, wire.StepReport)
    assert report.num_drafted == b"" and report.source == "own" and report.roster is None


@pytest.mark.parametrize("name", MESSAGES)
def test_other_version_is_refused_by_name(name: str) -> None:
    plain = msgspec.msgpack.decode(wire.encode(MESSAGES[name]))
    plain["version"] = 2
    with pytest.raises(wire.MessageError, match="version 2 is not spoken here"):
        decode(name, msgspec.msgpack.encode(plain))
    # Also when the other version changed the fields.
    with pytest.raises(wire.MessageError, match="version 3 is not spoken here"):
        decode(name, msgspec.msgpack.encode({"type": "renamed", "version": 3}))


def test_frame_is_refused_unread_when_too_large() -> None:
    with pytest.raises(wire.MessageError, match="at most"):
        wire.decode_engine_message(bytes(wire.MAX_FRAME_BYTES + 1))


def test_column_is_refused_when_its_size_or_values_are_wrong() -> None:
    with pytest.raises(wire.MessageError, match="weight: 4 bytes, expected 8"):
        wire.unpack(b"\0\0\0\0", "f32", (2,), "weight")
    with pytest.raises(wire.MessageError, match="weight: holds a value that is not a number"):
        wire.unpack(wire.pack([np.nan], "f32"), "f32", (1,), "weight")
    assert wire.unpack(b"", "u8", (2,), "floor", 0).tolist() == [0, 0]


def test_columns_are_little_endian_when_packed() -> None:
    assert wire.pack([1], "u64") == b"\x01" + bytes(7)
    assert wire.pack([1.0], "f32") == b"\0\0\x80\x3f"


def test_bits_are_those_of_the_numbers() -> None:
    numbers = [0, 1, 9, 1 << 63, (1 << 64) - 1]
    column = wire.unpack(wire.pack(numbers, "u64"), "u64", (5,), "accepted_ranks")
    found = wire.bits(column)
    assert found.shape == (5, 64)
    assert [sum(1 << int(j) for j in np.flatnonzero(row)) for row in found] == numbers


def test_align_finds_the_place_of_each_id() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        known = rng.permutation(60)[: rng.integers(0, 30)].astype(np.uint64)
        wanted = rng.permutation(60)[: rng.integers(0, 30)].astype(np.uint64)
        places = {int(k): i for i, k in enumerate(known)}
        assert wire.align(known, wanted).tolist() == [places.get(int(w), -1) for w in wanted]


@st.composite
def mutilated(draw: st.DrawFn) -> bytes:
    """A real frame with bytes changed, cut off or put in."""
    frame = bytearray(wire.encode(MESSAGES[draw(st.sampled_from(sorted(MESSAGES)))]))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(frame) - 1)))
        match draw(st.integers(0, 2)):
            case 0 if frame:
                frame[at] = draw(st.integers(0, 255))
            case 1:
                del frame[at:]
            case _:
                frame[at:at] = draw(st.binary(max_size=8))
    return bytes(frame)


@settings(max_examples=10_000, deadline=None)
@given(st.one_of(st.binary(max_size=300), mutilated()))
def test_hostile_frame_raises_message_error_or_decodes(frame: bytes) -> None:
    for decoder in (wire.decode_engine_message, wire.decode_daemon_message):
        try:
            message = decoder(frame)
        except wire.MessageError:
            continue
        assert message.version == wire.PROTOCOL_VERSION
