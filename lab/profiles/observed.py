"""A simulator profile from what an engine itself reported: its steps, or what was learned of them.

The terms are the simulator's (`profile.Profile`), fitted by least squares of the relative error and
then scaled so that all steps together take what they took. The error told is of steps that the fit
has not seen. Reports do not say how long a chunk's prompt was before it: prompts cost per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from smartspec.daemon.event_bus import FrameEvent
from smartspec.daemon.recording import read
from smartspec.daemon.state.learned import Learned
from smartspec.engine_adapter.messages import (
    Hello,
    Limits,
    MessageError,
    StepReport,
    decode_engine_message,
    unpack,
)
from smartspec.engine_adapter.simulator.profile import Chunk, Draft, Profile, Source
from smartspec.engine_adapter.simulator.requests import F64
from smartspec.estimators.step_cost import StepShape
from smartspec.lab.profiles.fit import relative_fit

LEAST_STEPS = 40  #: to fit anything
BLOCK = 20  #: steps; every other block is held out for the error
KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LEAST_TRIALS = 5  #: of a request's drafts, to count in the spread over requests


class Step(NamedTuple):
    """What a step had to do and took; seconds."""

    batch: float
    verify_tokens: float
    prefill_tokens: float
    context_tokens: float
    draft_forwards: float
    draft_tokens: float
    target_s: float  #: NaN: not seen apart from drafting
    draft_s: float
    step_s: float


class AcceptanceSeen(NamedTuple):
    """What drafts brought: arguments of `lab.simulation.workload.Workload`."""

    acceptance: float  #: mean over requests of P(a draft is accepted | it is reached)
    concentration: float  #: of the Beta over requests
    presence: float  #: share of requests and steps for which drafts were to be had

    @classmethod
    def of(cls, tried: Iterable[tuple[int, int]], presence: float) -> AcceptanceSeen | None:
        """``tried`` : by request, drafts accepted, and these with the first that was not.

        None where no request has tried `LEAST_TRIALS`.
        """
        known = [pair for pair in tried if pair[1] >= LEAST_TRIALS]
        if not known:
            return None
        accepted, tries = np.array(known, np.float64).T
        rate = accepted / tries
        mean = float(np.clip(rate.mean(), 0.01, 0.99))
        # The spread of rates is that of the requests and of counting.
        counting = float((mean * (1 - mean) / tries).mean())
        spread = max(float(rate.var()) - counting, 1e-4)
        concentration = float(np.clip(mean * (1 - mean) / spread - 1, 0.5, 200.0))
        return cls(mean, concentration, presence)


class Visit(NamedTuple):
    """What a step did for one request."""

    num_emitted: int
    num_drafted: int
    num_accepted: int
    num_available: int
    features: tuple[float, ...]  #: by the engine's names for them


@dataclass
class Observed:
    """One engine's reports."""

    hello: Hello
    steps: list[Step] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)  #: between steps, while there was work
    kv_tokens: list[float] = field(default_factory=list)
    tried: dict[int, tuple[int, int]] = field(default_factory=dict)  #: by request: accepted, tried
    visits: dict[int, list[Visit]] | None = None  #: by request, in order, where they were asked for
    partial: set[int] = field(default_factory=set)  #: requests whose answers may not be whole here
    num_decoded: int = 0  #: requests and steps
    num_with_drafts: int = 0

    def acceptance(self) -> AcceptanceSeen | None:
        """None where nothing was drafted, or trees: they say nothing of chains."""
        if self.hello.limits.trees:
            return None
        presence = self.num_with_drafts / max(self.num_decoded, 1)
        return AcceptanceSeen.of(self.tried.values(), presence)


def of_recording(path: Path, *, with_visits: bool = False) -> dict[str, Observed]:
    """By engine, from a file of `smartspec record`. Raises RecordingError, OSError.

    ``with_visits``: keep what every step did for every request (`answers.of_visits`)
    """
    found: dict[str, _Reader] = {}
    with path.open("rb") as file:
        for event in read(file, str(path)):
            if not event.inbound:
                continue
            try:
                message = decode_engine_message(event.frame)
                if isinstance(message, Hello):
                    name = message.engine
                    if name not in found or found[name].peer != event.peer:
                        seen = Observed(message, visits={} if with_visits else None)
                        found[name] = _Reader(seen, event.peer)
                elif isinstance(message, StepReport):
                    for reader in found.values():
                        if reader.peer == event.peer:
                            reader.take(message, event)
            except MessageError:
                continue
    for reader in found.values():
        reader.end()
    return {name: reader.seen for name, reader in found.items()}


class _Reader:
    """Follows one engine's roster from report to report."""

    def __init__(self, seen: Observed, peer: bytes) -> None:
        self.seen, self.peer = seen, peer
        self._ids: list[int] = []
        self._version = -1
        self._last: tuple[int, float, bool] | None = None

    def end(self) -> None:
        """Whoever is there at the end may go on."""
        self.seen.partial.update(self._ids)

    def take(self, report: StepReport, event: FrameEvent) -> None:
        follows = self._last is not None and self._last[0] + 1 == report.seq
        left = self._ids
        if report.roster is not None:
            size = len(report.roster.request_ids) // 8
            self._ids = unpack(report.roster.request_ids, "u64", (size,), "request_ids").tolist()
            self._version = report.roster_version
        if report.roster_version != self._version or report.step_s <= 0:
            return
        size = len(self._ids)
        drafted, accepted, available = (
            unpack(column, "u8", (size,), name, 0).astype(np.int64)
            for column, name in (
                (report.num_drafted, "num_drafted"),
                (report.num_accepted, "num_accepted"),
                (report.num_available, "num_available"),
            )
        )
        seen = self.seen
        if not follows:  # steps in between, or before, are not known
            seen.partial.update(left, self._ids)
        apart = report.target_s is not None and report.draft_s is not None
        seen.steps.append(
            Step(
                size,
                size + int(drafted.sum()),
                report.num_prefill_tokens,
                report.context_tokens,
                report.num_draft_forwards,
                report.num_draft_tokens,
                report.target_s if apart and report.target_s is not None else np.nan,
                report.draft_s if apart and report.draft_s is not None else np.nan,
                report.step_s,
            )
        )
        if report.kv_usage > 0.02 and report.context_tokens:
            seen.kv_tokens.append(report.context_tokens / report.kv_usage)
        if follows and self._last is not None and self._last[2]:
            gap_s = event.at_s - self._last[1] - report.step_s
            if -0.5 * report.step_s < gap_s < report.step_s:
                seen.gaps_s.append(gap_s)
        self._last = report.seq, event.at_s, size > 0
        seen.num_decoded += size
        seen.num_with_drafts += int((available > 0).sum())
        if seen.visits is not None:
            emitted = unpack(report.num_emitted, "u8", (size,), "num_emitted")
            width = len(seen.hello.limits.features)
            features = unpack(report.features, "f32", (width, size), "features")
            columns = (column.tolist() for column in (emitted, drafted, accepted, available))
            for request, e, k, a, v, told in zip(
                self._ids, *columns, features.T.tolist(), strict=True
            ):
                seen.visits.setdefault(request, []).append(Visit(e, k, a, v, tuple(told)))
        for request, k, a in zip(self._ids, drafted.tolist(), accepted.tolist(), strict=True):
            if k:
                before = seen.tried.get(request, (0, 0))
                # After the first rejection nothing is known: a accepted, and one that was not.
                seen.tried[request] = before[0] + a, before[1] + a + (a < k)


def of_learned(learned: Learned, most_running: int) -> Observed:
    """What a daemon's cost model says of steps of all kinds, as if they had been reported."""
    rng = np.random.default_rng(0)
    key, cost = learned.key, learned.step_cost
    hello = Hello(
        engine=key.fingerprint.target,
        epoch=1,
        fingerprint=key.fingerprint,
        limits=Limits(
            max_length=key.max_length,
            max_num_running=most_running,
            graph_sizes=key.graph_sizes,
            drafts_known_first=key.drafts_known_first,
        ),
    )
    seen = Observed(hello)
    fixed_s, forward_s, token_s = cost.draft_cost()
    for _ in range(2000):
        size = int(np.exp(rng.uniform(0, np.log(most_running + 1))))
        depth = int(rng.integers(0, key.max_length + 1))
        drafts = size * depth
        prefill = int(rng.integers(16, 512)) if rng.random() < 0.3 else 0
        context = int(size * np.exp(rng.uniform(np.log(64), np.log(3000))))
        shape = StepShape(size, size + drafts, prefill, context)
        target_s = float(cost.target_curve(shape, [size + drafts + prefill])[0])
        forwards = 0 if key.drafts_known_first else depth
        if key.keeps_up:
            forwards = max(depth - 1, 0)
        draft_s = fixed_s + forward_s * forwards + token_s * drafts if depth else 0.0
        seen.steps.append(
            Step(size, size + drafts, prefill, context, forwards, drafts, target_s, draft_s,
                 target_s + draft_s)
        )  # fmt: skip
    return seen


def acceptance_of_learned(learned: Learned) -> AcceptanceSeen:
    """The Beta over requests whose first two hazards are those that were learned.

    P(2 accepted | 1 was) = (m c + 1) / (c + 1) for mean m and concentration c.
    """
    hazards = learned.acceptance.pooled_hazards()
    mean = float(np.clip(hazards[0], 0.01, 0.99))
    second = float(hazards[min(1, len(hazards) - 1)])
    spread = second - mean
    concentration = float(np.clip((1 - second) / spread, 0.5, 200.0)) if spread > 1e-3 else 200.0
    return AcceptanceSeen(mean, concentration, learned.acceptance.pooled_presence())


# -- the fit ------------------------------------------------------------------------------------


class _Terms(NamedTuple):
    knots: tuple[int, ...]
    target: F64  #: [segments + 4]: at the first knot, slopes, request, context, chunk, token
    draft: F64  #: [3]
    host: F64  #: [2]


def fit(seen: Observed, name: str, *, source: str = "reported") -> Profile:
    """The profile of an engine. Raises ValueError when there are too few steps.

    ``source``: what the notes call what was fitted.
    """
    steps = seen.steps
    if len(steps) < LEAST_STEPS:
        raise ValueError(f"{len(steps)} steps: at least {LEAST_STEPS} are needed")
    held = np.arange(len(steps)) // BLOCK % 2 == 1
    trial = _profile(seen, _fit([s for s, h in zip(steps, held, strict=True) if not h], seen), name)
    errors = [abs(seconds(trial, s) / s.step_s - 1) for s, h in zip(steps, held, strict=True) if h]
    made = _profile(seen, _fit(steps, seen), name)
    return msgspec.structs.replace(
        made,
        fit_error_mean=_round(float(np.mean(errors))),
        fit_error_p95=_round(float(np.quantile(errors, 0.95))),
        sources=_sources(seen, source),
    )


def seconds(made: Profile, step: Step) -> float:
    """What a profile says that a reported step takes, drafting and host included."""
    chunks = (Chunk(int(step.prefill_tokens), 0),) if step.prefill_tokens else ()
    total = made.target_seconds(
        int(step.batch), int(step.verify_tokens), int(step.context_tokens), chunks
    )
    if "own" in made.drafts and (step.draft_forwards or step.draft_tokens):
        cost = made.draft("own")
        total += cost.fixed_s + cost.per_forward_s * step.draft_forwards
        total += cost.per_token_s * step.draft_tokens
    return total


def _knots(tokens: F64) -> tuple[int, ...]:
    """Token counts between which time is a straight line: with steps on either side."""
    knots = [KNOTS[0]]
    for knot in KNOTS[1:]:
        if ((tokens > knots[-1]) & (tokens <= knot)).sum() >= 5 and (tokens >= knot).sum() >= 5:
            knots.append(knot)
    return tuple(knots)


def _padded(tokens: F64, sizes: Sequence[int]) -> F64:
    if not sizes:
        return tokens
    at = np.searchsorted(sizes, tokens)
    inside = at < len(sizes)
    padded: F64 = np.where(inside, np.array(sizes)[np.minimum(at, len(sizes) - 1)], tokens)
    return padded


def _solve(rows: F64, seconds: F64) -> F64:
    """Coefficients >= 0 whose steps take in all what they took."""
    scale = np.abs(rows).mean(axis=0)
    used = scale > 0
    found = np.zeros(rows.shape[1])
    if used.any() and (seconds > 0).any():
        real = seconds > 0
        scaled = rows[real][:, used] / scale[used]
        found[used] = np.array(relative_fit(scaled.tolist(), seconds[real].tolist())) / scale[used]
        found *= seconds.sum() / max(float((rows @ found).sum()), 1e-12)
    return found


def _fit(steps: Sequence[Step], seen: Observed) -> _Terms:
    x = np.array(steps, np.float64)
    batch, verify, prefill, context, forwards, drafts, target_s, draft_s, step_s = x.T
    tokens = _padded(verify + prefill, seen.hello.limits.graph_sizes)
    knots = _knots(tokens)
    ends = np.array([*knots[1:], np.inf])
    segments = np.clip(tokens[:, None] - np.array(knots), 0.0, ends - np.array(knots))
    target = np.column_stack([np.ones(len(x)), segments, batch, context, prefill > 0, prefill])
    is_lookup = seen.hello.limits.drafts_known_first
    drafting = np.column_stack([drafts > 0, forwards, drafts]).astype(np.float64)
    hosted = np.column_stack([np.ones(len(x)), batch])
    apart = bool(np.isfinite(target_s).all())
    if apart:
        of_target = _solve(target, target_s)
        of_draft = np.zeros(3) if is_lookup else _solve(drafting, draft_s)
        rest = step_s - target_s - (0.0 if is_lookup else draft_s)
        host = _solve(hosted, np.maximum(rest, 0.0))
    else:
        joint = target if is_lookup else np.column_stack([target, drafting])
        found = _solve(joint, step_s)
        width = target.shape[1]
        of_target, host = found[:width], np.zeros(2)
        of_draft = np.zeros(3) if is_lookup else found[width:]
    return _Terms(knots, of_target, of_draft, host)


def _profile(seen: Observed, terms: _Terms, name: str) -> Profile:
    knots, num = terms.knots, len(terms.knots)
    base, slopes = terms.target[0], terms.target[1 : num + 1]
    request, context, chunk, token = terms.target[num + 1 :]
    limits, print_ = seen.hello.limits, seen.hello.fingerprint
    beyond = knots[-1] * 4 + 64  # the last slope goes on
    points = [*knots, beyond]
    dense = np.concatenate([[base], base + np.cumsum(slopes * np.diff(points))])
    dense = np.maximum(dense, 1e-7)
    gap_s = max(float(np.median(seen.gaps_s)), 0.0) if seen.gaps_s else 0.0
    most = max(step.context_tokens + step.prefill_tokens for step in seen.steps)
    room = float(np.median(seen.kv_tokens)) if seen.kv_tokens else 2 * most
    fixed_s, forward_s, token_s = (_round(s) for s in terms.draft)
    own = Draft(fixed_s, forward_s, token_s, note="of the engine's own drafter")
    drafts_s = any(step.draft_tokens for step in seen.steps)
    return Profile(
        name=name,
        target=print_.target,
        accelerator=print_.accelerator or "not told",
        graph_sizes=tuple(limits.graph_sizes),
        dense_tokens=tuple(points),
        dense_s=tuple(_round(s) for s in dense),
        decode_fixed_s=0.0,
        decode_request_s=_round(request),
        decode_context_s=_round(context),
        chunk_fixed_s=_round(chunk),
        chunk_token_s=_round(token),
        chunk_pair_s=0.0,
        row_s=0.0,
        host_s=_round(terms.host[0] + gap_s),
        host_request_s=_round(terms.host[1]),
        drafts={} if limits.drafts_known_first or not drafts_s else {"own": own},
        max_num_running=limits.max_num_running,
        kv_tokens=int(max(room, most + 1)),
        chunk_tokens=int(max([*(step.prefill_tokens for step in seen.steps), 64])),
        fit_error_mean=0.0,
        fit_error_p95=0.0,
        sources=(),
    )


def _sources(seen: Observed, source: str) -> tuple[Source, ...]:
    steps = seen.steps
    tokens = [step.verify_tokens + step.prefill_tokens for step in steps]
    with_prompts = sum(step.prefill_tokens > 0 for step in steps)
    drafting = sum(step.draft_tokens > 0 for step in steps)
    apart = "" if np.isfinite([s.target_s for s in steps]).all() else ", with drafting in one sum"
    told = [
        Source(
            "dense", "measured",
            f"{len(steps)} steps {source}, of {min(tokens):.0f} to {max(tokens):.0f} tokens"
            f"{apart}; beyond them a straight line",
        ),
        Source(
            "decode_attention", "measured",
            f"by requests and context, up to {max(s.context_tokens for s in steps):.0f} entries",
        ),
        Source(
            "prefill_attention", "measured" if with_prompts else "scaled",
            f"{with_prompts} steps with prompts, by their tokens" if with_prompts
            else "no step with prompts: their tokens cost as decoding's do",
        ),
        Source(
            "host", "measured",
            f"beside model and drafter, and {len(seen.gaps_s)} gaps between steps"
            if seen.gaps_s else "beside model and drafter; gaps between steps are not known",
        ),
        Source(
            "kv_tokens", "measured" if seen.kv_tokens else "scaled",
            "context over the share in use" if seen.kv_tokens
            else "not told by the engine: twice the most that was in use",
        ),
    ]  # fmt: skip
    if drafting and not seen.hello.limits.drafts_known_first:
        told.append(Source("draft", "measured", f"{drafting} steps with drafts"))
    return tuple(told)


def _round(value: float) -> float:
    return float(f"{value:.5g}")
