"""What is learned of one kind of engine, and how it is kept: versioned, checked, bounded.

A checkpoint is one frame of MessagePack: a format's name, a version, and a body with its SHA-256.
The body says whose it is (`ModelKey`), who learned it and when, and holds the estimators' states as
plain values; never anything that is executed. What is read back is checked as if it came from a
stranger: name, version, digest, sizes, the constructor arguments that this release would use itself
(which bounds all memory before it is taken), the estimators' own checks, and a trial step.

Of requests nothing is kept: what was learned of them ends with the engine's epoch, as their ids do.

Evolution: append only, as on the wire (engine_adapter/messages.py). What an old release would
misread raises `VERSION`, and is then refused there by name.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any, Self

import msgspec
import numpy as np
from msgspec import Meta, Struct

from smartspec.engine_adapter.messages import (
    MAX_STEP_S,
    BucketAxis,
    Fingerprint,
    Hello,
    Length,
    Text,
    UInt,
)
from smartspec.estimators.acceptance import AcceptanceEstimator
from smartspec.estimators.continuation import Continuation
from smartspec.estimators.features import BUCKET_EDGES
from smartspec.estimators.step_cost import StepCost, StepShape
from smartspec.estimators.tree_acceptance import TreeAcceptance

FORMAT = "smartspec-learned"
VERSION = 2
MAX_BYTES = 1 << 20  #: of a checkpoint
MAX_GRAPH_SIZES = 1024
WARM_STEPS = 100  #: steps steered after which an engine is not swept any more
#: Where a step's cost may bend. On a CPU one token (matrix times vector) is far cheaper than two;
#: a GPU's roofline shows in the hundreds, and a line through both sides of a knee says that drafts
#: which cost nothing are dear: so knots are no more than half as far again from each other there.
#: From 128 on they are a quarter apart, up to where drafts come on top of passes that prompts have
#: filled (budgets of 512 to 2048 tokens are usual): GPUs take stairs, of 64 tokens on an A100, and
#: what a line misses of a stair below the budget it takes from the price of drafts above.
COST_KNOTS = (
    2, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 2048,
)  # fmt: skip
RELEASE = version("smartspec")


class RefusedState(ValueError):
    """A checkpoint that is not used. The message says why."""


class ModelKey(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What must be equal for learned models to carry over: the fingerprint, and their shape."""

    fingerprint: Fingerprint
    max_length: Length
    graph_sizes: tuple[UInt, ...] = ()
    drafts_known_first: bool = False
    axes: tuple[BucketAxis, ...] = ()
    trees: bool = False
    keeps_up: bool = False  #: forwards are counted from the second one on

    @classmethod
    def of(cls, hello: Hello) -> Self:
        """The key of an engine that has introduced itself."""
        limits = hello.limits
        return cls(
            fingerprint=hello.fingerprint,
            max_length=limits.max_length,
            graph_sizes=limits.graph_sizes,
            drafts_known_first=limits.drafts_known_first,
            axes=tuple(
                BucketAxis(feature=name, edges=BUCKET_EDGES[name])
                for name in limits.features
                if name in BUCKET_EDGES
            ),
            trees=limits.trees and limits.max_length > 0,
            keeps_up=limits.keeps_up,
        )

    @property
    def id(self) -> str:
        """Name of the key in files and in Redis: ``<fingerprint>-<shape>``, both hexadecimal."""
        shape = msgspec.structs.replace(self, fingerprint=_NO_FINGERPRINT)
        return f"{fingerprint_id(self.fingerprint)}-{_hash(shape)[:8]}"

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        """Digits per axis of a bucket's index."""
        return tuple(len(axis.edges) + 1 for axis in self.axes)

    @property
    def num_buckets(self) -> int:
        return math.prod(self.axis_sizes)

    def check(self) -> None:
        """Raise `RefusedState` unless an engine of this release could have this key."""
        names = [axis.feature for axis in self.axes]
        for axis in self.axes:
            if axis.edges != BUCKET_EDGES.get(axis.feature) or names.count(axis.feature) > 1:
                raise RefusedState(f"axes: {axis.feature!r} is cut otherwise in this release")
        if len(self.graph_sizes) > MAX_GRAPH_SIZES:
            raise RefusedState(f"graph_sizes: more than {MAX_GRAPH_SIZES}")

    def differences(self, other: ModelKey) -> str:
        """What differs in shape, as people would say it: ``max_length 5, now 8``."""
        return ", ".join(
            f"{name} {_shown(getattr(self, name))}, now {_shown(getattr(other, name))}"
            for name in _SHAPE
            if getattr(self, name) != getattr(other, name)
        )


_NO_FINGERPRINT = Fingerprint(target="", proposer="")
_SHAPE = ("max_length", "graph_sizes", "drafts_known_first", "axes", "trees", "keeps_up")


def fingerprint_id(fingerprint: Fingerprint) -> str:
    """The first half of a key's `ModelKey.id`."""
    return _hash(fingerprint)[:16]


def _hash(struct: Struct) -> str:
    return hashlib.sha256(msgspec.msgpack.encode(struct)).hexdigest()


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return str([a.feature if isinstance(a, BucketAxis) else a for a in value])
    return str(value)


Seconds = Annotated[float, Meta(ge=0.0, le=1e12)]


class Checkpoint(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was learned, as plain values: the body of a frame."""

    key: ModelKey
    saved_s: Seconds  #: since the Unix epoch
    num_steps: UInt  #: learned from, restarts included
    num_steered: UInt  #: of these, under a policy
    acceptance: dict[str, Any]  #: state of the estimator
    step_cost: dict[str, Any]
    engine: Text = ""  #: the one that learned it
    release: Text = ""  #: of SmartSpec, that wrote it


def _acceptance_of(key: ModelKey) -> type[AcceptanceEstimator]:
    return TreeAcceptance if key.trees else AcceptanceEstimator


class Learned:
    """The models of one kind of engine, and how much they have seen."""

    def __init__(
        self,
        key: ModelKey,
        acceptance: AcceptanceEstimator,
        step_cost: StepCost,
        num_steps: int = 0,
        num_steered: int = 0,
    ) -> None:
        self.key = key
        self.acceptance = acceptance
        self.step_cost = step_cost
        self.num_steps = num_steps
        self.num_steered = num_steered
        self.continuation = Continuation(key.num_buckets)  #: not kept: it is soon known again

    @classmethod
    def new(cls, key: ModelKey) -> Self:
        """Models that have seen nothing."""
        kind = _acceptance_of(key)
        return cls(
            key,
            kind(key.num_buckets, max(1, key.max_length), axis_sizes=key.axis_sizes),
            StepCost(
                knots=COST_KNOTS,
                graph_sizes=key.graph_sizes,
                draft_forwards=not key.drafts_known_first,
            ),
        )

    @property
    def is_warm(self) -> bool:
        """Whether lengths have been tried: steps that were only watched do not count."""
        return self.num_steered > WARM_STEPS

    def checkpoint(self, engine: str = "", saved_s: float | None = None) -> Checkpoint:
        """What was learned until now; ``saved_s``: when, by default now."""
        return Checkpoint(
            key=self.key,
            saved_s=time.time() if saved_s is None else saved_s,
            num_steps=self.num_steps,
            num_steered=self.num_steered,
            acceptance=self.acceptance.state(requests=False),
            step_cost=self.step_cost.state(),
            engine=engine,
            release=RELEASE,
        )


# -- frames -------------------------------------------------------------------------------------


class _Frame(Struct, frozen=True, kw_only=True):
    format: str
    version: int
    digest: bytes
    body: bytes


class _Head(Struct):
    """What tells a frame of another version, whatever else has become of it."""

    format: str = ""
    version: int = 0


_encoder = msgspec.msgpack.Encoder()
_frame_decoder = msgspec.msgpack.Decoder(_Frame)
_head_decoder = msgspec.msgpack.Decoder(_Head)
_body_decoder = msgspec.msgpack.Decoder(Checkpoint)


def encode(checkpoint: Checkpoint) -> bytes:
    """One frame."""
    body = _encoder.encode(checkpoint)
    digest = hashlib.sha256(body).digest()
    return _encoder.encode(_Frame(format=FORMAT, version=VERSION, digest=digest, body=body))


def decode(frame: bytes, key_id: str | None = None) -> Checkpoint:
    """The checkpoint of a frame, its values not yet looked at: see `check`.

    ``key_id`` is the name under which it was found. Raises `RefusedState`.
    """
    if len(frame) > MAX_BYTES:
        raise RefusedState(f"larger than {MAX_BYTES} bytes")
    body = _body(frame)
    try:
        checkpoint = _body_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedState(f"not learned state: {error}") from error
    if key_id is not None and checkpoint.key.id != key_id:
        raise RefusedState(f"of another fingerprint or shape: it belongs to {checkpoint.key.id}")
    return checkpoint


def _body(frame: bytes) -> bytes:
    try:
        head = _head_decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedState("damaged or cut short: not a frame") from error
    if head.format != FORMAT:
        raise RefusedState(f"not learned state: no format {FORMAT!r}")
    if head.version != VERSION:
        newer = "a newer" if head.version > VERSION else "another"
        raise RefusedState(
            f"version {head.version}, of {newer} release: version {VERSION} is read here"
        )
    try:
        decoded = _frame_decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedState("damaged or cut short: not a frame") from error
    if hashlib.sha256(decoded.body).digest() != decoded.digest:
        raise RefusedState("damaged: the digest does not match")
    return decoded.body


def restore(checkpoint: Checkpoint) -> Learned:
    """Models that go on from a checkpoint. Raises `RefusedState`."""
    checkpoint.key.check()
    try:
        new = Learned.new(checkpoint.key)
        fresh = new.checkpoint()
        _same_params("acceptance", checkpoint.acceptance, fresh.acceptance)
        _same_params("step_cost", checkpoint.step_cost, fresh.step_cost)
        return Learned(
            checkpoint.key,
            _acceptance_of(checkpoint.key).from_state(checkpoint.acceptance),
            StepCost.from_state(checkpoint.step_cost),
            checkpoint.num_steps,
            checkpoint.num_steered,
        )
    except RefusedState:
        raise
    except Exception as error:  # whatever a stranger's values lead to
        raise RefusedState(f"not learned state: {error}") from error


def merge(one: Checkpoint, other: Checkpoint) -> Checkpoint:
    """What two daemons learned of one kind of engine: of each thing by who has more evidence of it.

    Neither need know whether it started from the other: what both know is not counted twice.
    Raises `RefusedState`.
    """
    if one.key != other.key:
        raise RefusedState(f"of other limits: {one.key.differences(other.key)}")
    more, less = sorted((one, other), key=lambda c: c.num_steps, reverse=True)
    learned, lesser = restore(more), restore(less)
    try:
        learned.acceptance.merge(lesser.acceptance)
        learned.step_cost.merge(lesser.step_cost)
    except (ValueError, np.linalg.LinAlgError) as error:
        raise RefusedState(f"cannot be merged: {error}") from error
    learned.num_steered = max(more.num_steered, less.num_steered)
    return learned.checkpoint(more.engine, max(more.saved_s, less.saved_s))


def check(checkpoint: Checkpoint) -> None:
    """Restore a checkpoint once, and try the models out. Raises `RefusedState`."""
    try:
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            _try_out(restore(checkpoint))
    except RefusedState:
        raise
    except Exception as error:
        raise RefusedState(f"cannot be used: {error!r}") from error


def _same_params(name: str, given: Mapping[str, Any], fresh: Mapping[str, Any]) -> None:
    """Arguments of this release only: others would be another model, and of any size."""
    if given.get("kind") != fresh["kind"]:
        raise RefusedState(f"{name}: a {given.get('kind')!r}, this release has a {fresh['kind']}")
    params = given.get("params")
    if not isinstance(params, Mapping) or dict(params) != fresh["params"]:
        raise RefusedState(f"{name}: params are not those of this release")


def _try_out(learned: Learned) -> None:
    acceptance, cost = learned.acceptance, learned.step_cost
    most = learned.key.max_length
    for _ in range(2):  # as it came, and after a step of its own
        survival = acceptance.log_survival()
        seconds = cost.target_curve(StepShape(1, 1), cost.breakpoints(1, 1024))
        busy = StepShape(64, 256, 512, 65536, 1, 192, 64)
        spread = [cost.std(shape) for shape in (StepShape(1, 1), busy)]
        costs = np.array([*seconds, *cost.draft_cost(), *spread])
        if not (np.isfinite(survival).all() and (survival <= 0.0).all()):
            raise RefusedState("acceptance: survivals are not probabilities")
        if not (costs >= 0.0).all() or not (costs <= MAX_STEP_S).all() or seconds.min() <= 0.0:
            raise RefusedState(f"step_cost: not within 0 to {MAX_STEP_S:.0f} seconds")
        acceptance.learn_one({"request_id": 1, "drafted": min(most, 1)}, min(most, 1))
        cost.observe(StepShape(1, 1 + min(most, 1)), None, None, float(seconds[0]))
