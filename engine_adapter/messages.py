"""The wire between engines and the daemon: the only definition of it.

Frames are MessagePack maps with a ``type`` tag; one message, one frame. Per-request data travel as
*columns*: little-endian arrays in binary fields, aligned with the report's roster, so that request
ids travel only when they change.

Evolution: append only. A new field goes to the end, with a default that means "as before"; a
field is never renamed, retyped or reused. Unknown fields are skipped, so either side may be newer
within one `PROTOCOL_VERSION`; a change that an old peer would misread raises it, and a peer of
another version is refused by name. Golden bytes of every version are kept in the tests.

Directions: `EngineMessage` goes up to the daemon, `DaemonMessage` comes down.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 1 << 20  #: larger frames are refused unread
MAX_BATCH = 4096  #: requests in one report
#: A feature: the probability that the drafter gives its first draft, 0 to 1, where that is run
#: before lengths are chosen; NOT_RUN for a request where it was not.
FEATURE_DRAFT_CONFIDENCE, NOT_RUN = "draft_confidence", -1.0
MAX_LENGTH = 64  #: speculation length; a tree's ranks are the bits of a u64
MAX_BUCKETS = 4096  #: of an acceptance table
LARGEST = 1e12  #: of any number: products of two stay finite, in f32 too
MAX_STEP_S = 600.0  #: a step that claims to have taken longer is a fault of the clock
SOURCES = ("policy", "probe", "fallback", "own")  #: of a step's lengths
STEERED = ("policy", "probe")  #: those of a policy in force

UInt = Annotated[int, Meta(ge=0)]
Amount = Annotated[float, Meta(ge=0.0, le=LARGEST)]  #: refuses NaN too
Length = Annotated[int, Meta(ge=0, le=MAX_LENGTH)]
Text = Annotated[str, Meta(max_length=256)]


class MessageError(ValueError):
    """A frame that cannot be used. The message says which field, and what was expected."""


class Message(Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    version: int = PROTOCOL_VERSION


# -- engine to daemon ---------------------------------------------------------------------------


class Fingerprint(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What must be equal for learned state to carry over from one engine to another."""

    target: Text
    proposer: Text  #: "lookup", "draft_model", "eagle", ...
    draft: Text = ""
    engine: Text = ""
    engine_version: Text = ""
    accelerator: Text = ""
    parallelism: Text = ""
    dtype: Text = ""
    attention_backend: Text = ""


class Limits(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the engine can do."""

    max_length: Length
    max_num_running: Annotated[int, Meta(ge=1, le=MAX_BATCH)]
    static_length: UInt = 0  #: the length of its own configuration
    features: tuple[Text, ...] = ()  #: rows of the feature columns, in order
    modes: tuple[Text, ...] = ("ragged",)  #: execution modes of verification
    graph_sizes: tuple[UInt, ...] = ()  #: token counts that passes are padded to, rising
    drafts_known_first: bool = False  #: drafts exist before lengths are chosen (prompt lookup)
    trees: bool = False  #: a length is a number of nodes of a tree, the most probable first
    confidences: bool = False  #: can stop drafting, and cut drafts, by its drafter's confidences
    #: Its drafter's first forward is run in every step, whether or not anything is drafted: what a
    #: draft costs begins with the second.
    keeps_up: bool = False


class Hello(Message, frozen=True, tag="hello"):
    """An engine has started, or was asked to introduce itself again."""

    engine: Text  #: its name, unique on this daemon
    epoch: UInt  #: differs at every start of the engine
    fingerprint: Fingerprint
    limits: Limits


class Roster(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who is in the batch, in the order of all columns. Empty columns mean the default."""

    version: UInt  #: rises with every change
    request_ids: bytes  #: u64 [B], unique within the epoch
    weight: bytes = b""  #: f32 [B] > 0; default 1
    floor: bytes = b""  #: u8 [B]; default 0
    token_time_target_s: bytes = b""  #: f32 [B], seconds per token at most; 0, the default: any


class StepReport(Message, frozen=True, tag="step"):
    """What one step did and took. Times in seconds, measured by the engine's monotonic clock."""

    epoch: UInt
    seq: UInt  #: rises by one with every step, sent or not
    roster_version: UInt
    step_s: float
    roster: Roster | None = None  #: given when it has changed since the last report sent
    target_s: float | None = None  #: None: not observed apart
    draft_s: float | None = None
    num_drafted: bytes = b""  #: u8 [B], verified in this step
    num_accepted: bytes = b""  #: u8 [B]
    num_emitted: bytes = b""  #: u8 [B]
    num_available: bytes = b""  #: u8 [B], longest length that was possible
    features: bytes = b""  #: f32 [F, B], as known when the lengths were chosen
    num_prefill_tokens: UInt = 0
    context_tokens: UInt = 0
    num_draft_forwards: UInt = 0
    num_draft_tokens: UInt = 0
    num_catch_up_tokens: UInt = 0
    num_waiting: UInt = 0
    kv_usage: float = 0.0
    mode: Text = "ragged"
    policy_seq: UInt = 0  #: the policy that chose these lengths; 0: none did
    source: Text = "own"  #: who chose: one of `SOURCES`
    num_dropped: UInt = 0  #: reports not sent since the epoch began
    #: u64 [B], of trees: bit j is set when node j was accepted; behind those verified, those cut
    accepted_ranks: bytes = b""
    num_cut: bytes = b""  #: u8 [B], drafts behind those verified that were not
    #: u8 [B], of these, those that would be accepted too (of chains if all verified are): known of
    #: what follows the last one accepted, and further on drawn by calibrated chances
    num_cut_accepted: bytes = b""


class Goodbye(Message, frozen=True, tag="goodbye"):
    """The engine stops; its state may be dropped."""

    epoch: UInt


# -- daemon to engine ---------------------------------------------------------------------------


class Curve(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Seconds of a target pass by tokens in it (lengths.CostCurve)."""

    mode: Text
    num_tokens: tuple[Amount, ...]  #: [M], rising; a dozen numbers decode faster than a column
    seconds: tuple[Amount, ...]  #: [M]


class BucketAxis(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One digit of a bucket's index: how many ``edges`` the feature reaches (>=)."""

    feature: Text
    edges: tuple[float, ...]  #: rising


class Policy(Message, frozen=True, tag="policy"):
    """A small program: how to choose lengths until a newer one comes, or it expires.

    At step time the engine takes bucket and correction of each request of its *present* batch,
    and the lengths of greatest ``gain - value_of_time * T`` (lengths.choose_lengths), an accepted
    draft counting for what it is worth in its bucket.
    """

    epoch: UInt  #: the engine epoch that it is for
    daemon_epoch: UInt  #: differs at every start of the daemon
    seq: UInt  #: rises; from 1
    report_seq: UInt  #: the newest report that it knew
    ttl_s: Annotated[float, Meta(gt=0.0, le=LARGEST)]  #: lasts so long without a further word
    value_of_time: Amount  #: lambda, tokens per second
    depth: UInt  #: length to draft to
    curves: tuple[Curve, ...]
    max_length: Length  #: rows of the acceptance table
    log_survival: bytes  #: f32 [max_length, num_buckets]
    axes: tuple[BucketAxis, ...] = ()  #: first axis slowest; none: a single bucket
    draft_fixed_s: Amount = 0.0
    draft_per_forward_s: Amount = 0.0
    draft_per_token_s: Amount = 0.0
    roster_version: UInt = 0
    correction: bytes = b""  #: f32 [B] of that roster; others: 1
    probe_length: Length = 0  #: to be drafted once, at the first step under this policy,
    num_probes: UInt = 0  #: by this many requests (those with the shortest lengths first)
    fallback_batch: tuple[UInt, ...] = ()  #: after expiry: from this batch size on, rising, ...
    fallback_length: tuple[Length, ...] = ()  #: ... this length
    fallback_s: Amount = 60.0  #: for this long; then the engine's own configuration
    predicted_goodput: float = 0.0  #: tokens per second
    reason: Annotated[str, Meta(max_length=1024)] = ""
    meet_targets: bool = False  #: requests' token time targets are to be kept (targets.py)
    draft_forwards: tuple[Amount, ...] = ()  #: of 1, 2, ... drafts or nodes (lengths.DraftCost)
    by_confidence: bool = False  #: up to ``depth`` by the drafter's confidences (prices.py)
    #: A small batch may be drafted for to another depth, the best one, up to this; 0: to ``depth``.
    deepest: Length = 0
    #: Without first drafts run beforehand some would be drafted for: those runs are not saved by
    #: drafting nothing now (lengths.DraftCost.begun).
    goes_on: bool = False
    worth: bytes = b""  #: f32 [num_buckets], tokens that an accepted draft is worth; empty: 1
    draft_per_catch_up_s: Amount = 0.0


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """The daemon lives; policies stay in force."""

    daemon_epoch: UInt


class Resync(Message, frozen=True, tag="resync"):
    """The daemon lacks this engine's Hello or roster: send both again."""

    daemon_epoch: UInt
    reason: Text = ""


class Refused(Message, frozen=True, tag="refused"):
    """The daemon will not serve this engine, and says why. The engine runs on as configured."""

    daemon_epoch: UInt
    reason: Text = ""


EngineMessage = Hello | StepReport | Goodbye
DaemonMessage = Policy | Heartbeat | Resync | Refused

_encoder = msgspec.msgpack.Encoder()
_engine_decoder = msgspec.msgpack.Decoder(EngineMessage)
_daemon_decoder = msgspec.msgpack.Decoder(DaemonMessage)


class _VersionOnly(Struct):
    version: int = PROTOCOL_VERSION


_version_decoder = msgspec.msgpack.Decoder(_VersionOnly)


def encode(message: Message) -> bytes:
    """One frame."""
    return _encoder.encode(message)


def decode_engine_message(frame: bytes | memoryview) -> EngineMessage:
    """A frame from an engine; raises `MessageError`."""
    return _decode(_engine_decoder, frame)  # type: ignore[no-any-return]


def decode_daemon_message(frame: bytes | memoryview) -> DaemonMessage:
    """A frame from the daemon; raises `MessageError`."""
    return _decode(_daemon_decoder, frame)  # type: ignore[no-any-return]


def _decode(decoder: Any, frame: bytes | memoryview) -> Any:
    if len(frame) > MAX_FRAME_BYTES:
        raise MessageError(f"frame of {len(frame)} bytes; at most {MAX_FRAME_BYTES} are read")
    try:
        message = decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # A peer of another version may well not decode: say so rather than name a field.
        try:
            version = _version_decoder.decode(frame).version
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            version = PROTOCOL_VERSION
        _check_version(version)
        raise MessageError(f"not a message of version {PROTOCOL_VERSION}: {error}") from error
    _check_version(message.version)
    return message


def _check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise MessageError(
            f"protocol version {version} is not spoken here (version {PROTOCOL_VERSION} is): "
            "install matching releases of smartspec beside the engine and the daemon"
        )


# -- columns ------------------------------------------------------------------------------------

_DTYPES: dict[str, np.dtype[Any]] = {
    "u8": np.dtype("<u1"),
    "u64": np.dtype("<u8"),
    "f32": np.dtype("<f4"),
}


def pack(values: npt.ArrayLike, dtype: str) -> bytes:
    """A column's bytes; ``dtype`` is "u8", "u64" or "f32".

    >>> pack([1, 2], "u8")
    b'\\x01\\x02'
    """
    kind = _DTYPES[dtype]
    if not isinstance(values, np.ndarray) or values.dtype != kind:
        values = np.asarray(values, kind)
    return values.tobytes()


def unpack(
    column: bytes,
    dtype: str,
    shape: tuple[int, ...],
    name: str,
    default: float | None = None,
    *,
    low: float = -LARGEST,
    high: float = LARGEST,
) -> npt.NDArray[Any]:
    """A column as a read-only array of ``shape``; empty means ``default`` where there is one.

    Raises `MessageError` when the size is wrong, or a float is not a number in [low, high].
    """
    kind = _DTYPES[dtype]
    if not column and default is not None:
        return np.full(shape, default, kind)
    size = math.prod(shape)
    if len(column) != size * kind.itemsize:
        raise MessageError(
            f"{name}: {len(column)} bytes, expected {size * kind.itemsize} ({dtype} {list(shape)})"
        )
    array = np.frombuffer(column, kind)
    # Minimum and maximum are NaN if anything is, and then fail both comparisons.
    if dtype == "f32" and size and not (low <= array.min() and array.max() <= high):
        raise MessageError(f"{name}: holds a value that is not a number in {low:g} to {high:g}")
    return array if len(shape) == 1 else array.reshape(shape)


def bits(column: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """A u64 column [B] bit by bit, the lowest first: [B, 64].

    >>> bits(np.array([5], "<u8"))[0, :4].tolist()
    [True, False, True, False]
    """
    of_bytes = column.view(np.uint8).reshape(len(column), 8)
    return np.unpackbits(of_bytes, axis=1, bitorder="little").view(np.bool_)


def align(known: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Where each of ``wanted`` ids stands in ``known`` ids; -1 where it does not.

    >>> align(np.array([7, 3, 9]), np.array([9, 4, 7])).tolist()
    [2, -1, 0]
    """
    if not len(known):
        return np.full(len(wanted), -1)
    order = np.argsort(known)
    at = np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)
    found = order[at]
    return np.where(known[found] == wanted, found, -1)


def require(condition: bool, what: str) -> None:
    """Raise `MessageError` with ``what`` unless ``condition``."""
    if not condition:
        raise MessageError(what)


def to_plain(struct: Struct) -> dict[str, Any]:
    """A message part as plain data, for logs and inspection."""
    plain: dict[str, Any] = msgspec.to_builtins(struct)
    return plain
