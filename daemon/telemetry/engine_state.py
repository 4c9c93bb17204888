"""What is known of one engine, folded from the events about it: what Redis and people are shown."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from smartspec.daemon.event_bus import (
    BusEvent,
    DecisionEvent,
    EngineEvent,
    GainEvent,
    PresentEvent,
    StepEvent,
)

IDLE_S = 10.0  #: without a step, an engine has nothing to do; no step should take so long
SMOOTHING_S = 5.0  #: memory of the smoothed figures, in seconds of engine steps


class EngineState(Struct, kw_only=True):
    """The newest of everything; None: not known yet. Documented in docs/redis.md.

    "Smoothed" figures are ratios of sums that are forgotten over `SMOOTHING_S` of step time.
    """

    engine: str
    state: str = "connected"
    epoch: int | None = None
    fingerprint: dict[str, str] = {}
    limits: dict[str, Any] = {}
    updated_s: float = 0.0
    # the last step
    step_seq: int | None = None
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    context_tokens: int = 0
    step_s: float | None = None
    source: str | None = None
    staleness_steps: int | None = None
    # totals, since the telemetry process first saw the engine
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_emitted: int = 0
    # the last decision
    policy_seq: int | None = None
    steering: bool | None = None
    reason: str | None = None
    depth: int | None = None
    mode: str | None = None
    length_counts: tuple[int, ...] = ()
    value_of_time: float | None = None
    acceptance: tuple[float, ...] = ()
    decide_s: float | None = None
    num_probes: int = 0
    num_targets: int = 0
    num_targets_out_of_reach: int = 0
    predicted_goodput: float | None = None
    predicted_goodput_none: float | None = None
    predicted_goodput_static: float | None = None
    # smoothed
    goodput: float | None = None
    prediction_error: float | None = None
    # what it brings, with 95% intervals
    stance: str | None = None
    arm: str | None = None
    gain_over_none: float | None = None
    gain_over_none_low: float | None = None
    gain_over_none_high: float | None = None
    gain_over_static: float | None = None
    gain_over_static_low: float | None = None
    gain_over_static_high: float | None = None
    measured_over_none: float | None = None
    measured_over_none_low: float | None = None
    measured_over_none_high: float | None = None
    measured_over_static: float | None = None
    measured_over_static_low: float | None = None
    measured_over_static_high: float | None = None
    num_compared_none: int = 0
    num_compared_static: int = 0
    bias_none: float | None = None
    bias_static: float | None = None
    evidence_worse: float = 1.0
    num_retreats: int = 0
    retry_s: float | None = None


class SmoothedRatio:
    """Ratio of two sums, each forgotten exponentially over ``memory_s``.

    >>> ratio = SmoothedRatio(memory_s=1.0)
    >>> ratio.add(2.0, 1.0, elapsed_s=0.1); ratio.add(4.0, 2.0, elapsed_s=0.1); ratio.value
    2.0
    """

    def __init__(self, memory_s: float = SMOOTHING_S) -> None:
        self.memory_s = memory_s
        self._above = 0.0
        self._below = 0.0

    def add(self, above: float, below: float, elapsed_s: float) -> None:
        keep = math.exp(-max(elapsed_s, 0.0) / self.memory_s)
        self._above = keep * self._above + above
        self._below = keep * self._below + below

    @property
    def value(self) -> float | None:
        ratio = self._above / self._below if self._below > 0 else math.nan
        return ratio if math.isfinite(ratio) else None


class EngineTracker:
    """Folds the events of one engine into its `state`.

    Parameters
    ----------
    engine : its name
    now : of a monotonic clock, seconds
    """

    def __init__(self, engine: str, now: float) -> None:
        self.state = EngineState(engine=engine)
        self._idle_at = now + IDLE_S  #: infinite: it is known to be
        self._restart()

    def _restart(self) -> None:
        self._goodput = SmoothedRatio()
        self._error = SmoothedRatio()

    def rests(self, now: float) -> bool:
        """Whether it has turned out to be idle just now: its last figures no longer hold."""
        if now < self._idle_at:
            return False
        self._idle_at = math.inf
        self.state.num_running = self.state.num_waiting = 0
        self.state.goodput = 0.0
        return True

    def note(self, event: StepEvent | DecisionEvent | GainEvent | EngineEvent, now: float) -> None:
        if not _is_reminder(event) or not self.state.updated_s:
            self.state.updated_s = event.t_s
        match event:
            case StepEvent():
                self._idle_at = now + IDLE_S
                self._note_step(event)
            case DecisionEvent():
                self._note_decision(event)
            case GainEvent():
                _copy(event, self.state, _GAIN_FIELDS)
            case EngineEvent():
                self._note_engine(event)

    def _note_engine(self, event: EngineEvent) -> None:
        state = self.state
        if event.state == "connected" and event.epoch != state.epoch:
            self._restart()
        state.state = event.state
        state.epoch = event.epoch
        state.fingerprint = event.fingerprint or state.fingerprint
        state.limits = event.limits or state.limits

    def _note_step(self, event: StepEvent) -> None:
        state = self.state
        state.state = "connected"  # the event that said so may be lost
        state.step_seq = event.seq
        _copy(event, state, _STEP_FIELDS)
        state.num_steps += 1
        state.num_drafted += event.num_drafted
        state.num_accepted += event.num_accepted
        state.num_emitted += event.num_emitted
        self._goodput.add(event.num_emitted, event.step_s, event.step_s)
        state.goodput = self._goodput.value
        if event.predicted_step_s is not None:
            miss_s = abs(event.predicted_step_s - event.step_s)
            self._error.add(miss_s, event.step_s, event.step_s)
            state.prediction_error = self._error.value

    def _note_decision(self, event: DecisionEvent) -> None:
        _copy(event, self.state, _DECISION_FIELDS)
        self.state.num_probes += event.num_probes


def _is_reminder(event: BusEvent) -> bool:
    """Whether it tells what was so before: then nothing was heard of the engine."""
    return isinstance(event, (GainEvent, PresentEvent))


def _copy(event: Struct, state: EngineState, names: tuple[str, ...]) -> None:
    for name in names:
        setattr(state, name, getattr(event, name))


def _shared(kind: type[Struct], *without: str) -> tuple[str, ...]:
    """Fields that an event has in common with the state, and that are taken over as they are."""
    names = set(EngineState.__struct_fields__) - {"engine", *without}
    return tuple(name for name in kind.__struct_fields__ if name in names)


_STEP_FIELDS = _shared(StepEvent, "num_drafted", "num_accepted", "num_emitted")
_DECISION_FIELDS = _shared(DecisionEvent, "num_probes")
_GAIN_FIELDS = _shared(GainEvent)


# -- as flat fields, for Redis hashes and stream entries ----------------------------------------

Kind = TypeVar("Kind", bound=Struct)


def to_fields(struct: Struct) -> dict[str, str | int | float | bytes]:
    """A struct as flat fields: text and numbers as they are, the rest as JSON, None left out."""
    fields: dict[str, str | int | float | bytes] = {}
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            continue
        plain = type(value) in (str, int, float)
        fields[name] = value if plain else msgspec.json.encode(value)
    return fields


def from_fields(kind: type[Kind], fields: Mapping[bytes, bytes]) -> Kind:
    """The struct that `to_fields` flattened; unknown fields are skipped.

    Raises msgspec.ValidationError or msgspec.DecodeError.
    """
    hints = _hints(kind)
    values: dict[str, Any] = {}
    for key, raw in fields.items():
        name = key.decode("utf-8", "replace")
        if name in hints:
            is_text = hints[name]
            values[name] = raw.decode("utf-8", "replace") if is_text else msgspec.json.decode(raw)
    return msgspec.convert(values, kind)


def _hints(kind: type[Struct]) -> dict[str, bool]:
    """Whether each field holds text."""
    hints = typing.get_type_hints(kind)
    return {name: _is_text(hints[name]) for name in kind.__struct_fields__}


def _is_text(hint: Any) -> bool:
    return hint is str or hint == str | None or typing.get_origin(hint) is Literal
