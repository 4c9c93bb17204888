"""An engine in virtual time that decodes recorded answers under a real daemon.

What each draft comes to is on record (record_acceptance.py); what a step takes is reckoned:
``base + token N (+ forward D)``, N tokens in the target's pass, D sequential draft passes. A token
costs a share of the base, which stands for load: a lone request on a large GPU pays 5% or less for
a further token, a busy one 50% and more.

The daemon and its policies are the real ones without the wire (estimators, planner, program). They
know what they would at each moment: reports of steps that have ended, with 2% of noise on their
times; and a policy arrives while the next step is under way, so that it steers the step after.

A draft model's first pass is run before lengths are chosen for those who were drafted for in the
step before, and charged whether or not it is used (engine_adapter/reference/draft_model.py); by
confidences no pass is run before the step's prices say so.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from acceptance_stream import Decoding, Rates, features, rates_for
from acceptance_traces import MAX_LENGTH, Answer, load

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fakes import Steering

from smartspec.engine_adapter.base import (
    FEATURE_DRAFT_CONFIDENCE,
    FEATURE_LAST_SHARE,
    FEATURE_MATCH_AGREEMENT,
    FEATURE_SECOND_ACCEPTANCE,
    FEATURE_TOKEN_ACCEPTANCE,
    DecodeBatch,
    FixedLength,
    LengthSource,
    StepFacts,
)
from smartspec.engine_adapter.lengths import F64, I64, Choice
from smartspec.engine_adapter.messages import Limits
from smartspec.engine_adapter.reference.calibration import temperature_bands
from smartspec.engine_adapter.reference.candidates import Candidates, Children, Ease, Level
from smartspec.engine_adapter.reference.growth import Growth
from smartspec.engine_adapter.reference.sequence import SamplingParams
from smartspec.engine_adapter.token_acceptance import TokenAcceptance

BASE_S = 0.02
NOISE = 0.02
SEED = 7
WRONG = 1 << 16  #: a draft that is not right: which it was is not on record
FEATURES = {
    "lookup": (
        FEATURE_LAST_SHARE,
        FEATURE_MATCH_AGREEMENT,
        FEATURE_TOKEN_ACCEPTANCE,
        FEATURE_SECOND_ACCEPTANCE,
    ),
    "draft": (FEATURE_LAST_SHARE, FEATURE_TOKEN_ACCEPTANCE, FEATURE_DRAFT_CONFIDENCE),
}


class Cell(NamedTuple):
    """One load, one mixture of tasks."""

    style: str
    batch: int
    token_share: float
    forward_share: float
    tasks: tuple[str, ...]  #: that are measured
    before: tuple[str, ...]  #: that a warm daemon has served
    num_answers: int | None = None  #: of each task; None: all
    confidences: bool = False  #: drafting stops, and drafts are cut, by the draft model's own

    @property
    def load(self) -> tuple[float, float]:
        """Shares of a step's base."""
        return self.token_share, self.forward_share

    @property
    def label(self) -> str:
        return self.tasks[0] if len(self.tasks) == 1 else f"{len(self.tasks)} tasks"


class Course(NamedTuple):
    """What decoding some answers took, whatever it costs."""

    num_emitted: int  #: tokens of answers
    num_steps: int
    num_tokens: int  #: of the target's passes
    num_forwards: int  #: of the drafter

    def goodput(self, token_share: float, forward_share: float = 0.0) -> float:
        """Tokens per second at a load."""
        shares = self.num_steps + token_share * self.num_tokens + forward_share * self.num_forwards
        return self.num_emitted / (BASE_S * shares)


class Drafted(NamedTuple):
    """What was drafted in a step."""

    lengths: I64  #: [B], verified
    num_forwards: int
    num_tokens: int  #: in these forwards
    num_cut: I64 | None = None  #: [B], behind those verified
    num_cut_accepted: I64 | None = None  #: of these


class Replay:
    """Decodes recorded answers to their end, `cell.batch` at a time, with lengths from a source."""

    def __init__(self, cell: Cell, seed: int) -> None:
        self.cell = cell
        self.is_lookup = cell.style == "lookup"
        self.rates = rates_for(cell.style)
        self.learned: Rates | None = self.rates  #: from what is verified
        self._rng = np.random.default_rng(seed)
        self._next_id = 0
        self.spent: F64 = np.zeros(0)  #: seconds of each answer in the last run

    def reseed(self, seed: int) -> None:
        """Draw order and noise anew; what was learned stays."""
        self._rng = np.random.default_rng(seed)

    def seconds(self, num_tokens: int, num_forwards: int) -> float:
        c = self.cell
        return BASE_S * (1.0 + c.token_share * num_tokens + c.forward_share * num_forwards)

    def run(self, answers: Sequence[Answer], source: LengthSource) -> Course:
        """Decode all ``answers``, in an order of the seed's."""
        order = self._rng.permutation(len(answers)).tolist()
        course = Course(0, 0, 0, 0)
        self.spent = np.zeros(len(answers))
        place_of: dict[int, int] = {}
        running: list[Decoding] = []
        shares: list[float] = []
        while True:
            alive = [i for i, one in enumerate(running) if not one.done]
            running, shares = [running[i] for i in alive], [shares[i] for i in alive]
            while order and len(running) < self.cell.batch:
                place = order.pop()
                answer = answers[place]
                if answer.size > 1:
                    self._next_id += 1
                    place_of[self._next_id] = place
                    running.append(Decoding(self._next_id, answer, self.cell.style))
                    shares.append(-1.0)
            if not running:
                return course
            if isinstance(source, Clairvoyant):
                source.look(running)
            batch = self._describe(running, shares)
            drafted = self._draft(running, batch, source.choose(batch))
            lengths = drafted.lengths
            accepted = [
                one.advance(length, self.learned)
                for one, length in zip(running, lengths.tolist(), strict=True)
            ]
            for i, (count, length) in enumerate(zip(accepted, lengths.tolist(), strict=True)):
                shares[i] = count / length if length else shares[i]
            self._learn(running, accepted)
            num_tokens, num_emitted = batch.size + int(lengths.sum()), sum(accepted) + len(running)
            added = num_emitted, 1, num_tokens, drafted.num_forwards
            course = Course(*map(operator.add, course, added))
            for one in running:
                step_s = self.seconds(num_tokens, drafted.num_forwards)
                self.spent[place_of[one.number]] += step_s / len(running)
            self._report(source, batch, drafted, np.array(accepted))

    def _describe(self, running: list[Decoding], shares: list[float]) -> DecodeBatch:
        known = features(running, self.rates) | {FEATURE_LAST_SHARE: np.array(shares)}
        return DecodeBatch(
            request_ids=np.array([one.number for one in running], np.uint64),
            ceiling=np.array([one.available for one in running], np.uint8),
            features=np.array([known[name] for name in FEATURES[self.cell.style]], np.float32),
        )

    def _draft(self, running: list[Decoding], batch: DecodeBatch, choice: Choice) -> Drafted:
        lengths = np.minimum(choice.lengths, batch.ceiling).astype(np.int64)
        if self.is_lookup:
            return Drafted(lengths, 0, 0)
        began = any(one.goes_on for one in running)
        num_forwards = max(int(lengths.max(initial=0)), int(began))
        return Drafted(lengths, num_forwards, int(lengths.sum()))

    def _learn(self, running: list[Decoding], accepted: list[int]) -> None:
        """Take in what became of a step."""

    def _report(
        self, source: LengthSource, batch: DecodeBatch, drafted: Drafted, accepted: I64
    ) -> None:
        """Tell the source of a step."""
        lengths, num_forwards, num_draft_tokens, cut, passed = drafted
        num_drafts = int(lengths.sum())
        target_s = self.seconds(batch.size + num_drafts, 0)
        draft_s = self.seconds(batch.size + num_drafts, num_forwards) - target_s
        noise = 1.0 + NOISE * self._rng.standard_normal(2)
        source.report(
            StepFacts(
                batch=batch,
                num_drafted=lengths.astype(np.uint8),
                num_accepted=accepted.astype(np.uint8),
                num_emitted=(accepted + 1).astype(np.uint8),
                step_s=float(target_s * noise[0] + draft_s * noise[1]),
                target_s=float(target_s * noise[0]),
                draft_s=float(draft_s * noise[1]),
                context_tokens=200 * batch.size,
                num_draft_forwards=num_forwards,
                num_draft_tokens=num_draft_tokens,
                num_cut=None if cut is None else cut.astype(np.uint8),
                num_cut_accepted=None if passed is None else passed.astype(np.uint8),
            )
        )


class ConfidentReplay(Replay):
    """Drafts as the reference worker's draft model does under prices (prices.py, growth.py).

    Of a draft behind a rejected one nothing is on record: its confidence is taken from the same
    place of the answer, as if the rejected one had been right; and which it was, neither.
    """

    def __init__(self, cell: Cell, seed: int) -> None:
        super().__init__(cell, seed)
        self.rates = self._by_token = TokenAcceptance()
        self.learned = None  # by the candidates, from all that is drafted
        self.calibration = Candidates.new_calibration()
        self._looks: set[int] = set()  # whose first draft is run before lengths are chosen
        self._sure: list[F64] = []  # by request, of drafts from here on
        self._tokens: list[list[int]] = []  # of these
        self._candidates: Candidates | None = None

    def _draft(self, running: list[Decoding], batch: DecodeBatch, choice: Choice) -> Drafted:
        began = np.array([one.goes_on for one in running])
        self._sure = [one.answer.draft_confidence[one.position :] for one in running]
        temperatures = temperature_bands(
            SamplingParams(temperature=one.answer.temperature) for one in running
        )
        ease = Ease(self._by_token, np.array([one.token_before for one in running]))
        ceiling = np.minimum(choice.lengths, batch.ceiling).astype(np.int64)
        self._tokens = [_drafts(one) for one in running]
        if choice.prices is None:
            self._looks = {one.number for one, k in zip(running, ceiling, strict=True) if k}
            self._candidates = Candidates(self.calibration, temperatures, ease=ease)
            tokens = [all_[:k] for all_, k in zip(self._tokens, ceiling, strict=True)]
            sure = [all_[:k].tolist() for all_, k in zip(self._sure, ceiling, strict=True)]
            self._candidates.draft(tokens, sure)
            return super()._draft(running, batch, choice)
        self._looks = set()
        growth = Growth(self.calibration, temperatures, ceiling, choice.prices, ease=ease)
        self._candidates = growth.candidates
        known = Level.of(np.flatnonzero(began))
        self._lengthen(growth, known)
        first = Level.of(growth.starting())
        self._lengthen(growth, first)
        num_forwards, num_tokens = bool(known.size) + bool(first.size), known.size + first.size
        while (level := growth.next_level([MAX_LENGTH] * len(running))).size:
            self._lengthen(growth, level)
            num_forwards, num_tokens = num_forwards + 1, num_tokens + level.size
        cut = growth.cut(self._rng.random(len(running)))
        sizes = cut.num_verified
        runs = [int(one.run[one.position]) for one in running]
        told = cut.accepted(
            [_said(one, one.position, k) for one, k in zip(running, sizes.tolist(), strict=True)],
            [list(range(min(run, k))) for run, k in zip(runs, sizes.tolist(), strict=True)],
        )
        passed = np.array([len(path) for path in told]) - np.minimum(runs, sizes)
        return Drafted(sizes, num_forwards, num_tokens, cut.num_cut.astype(np.int64), passed)

    def _lengthen(self, growth: Growth, level: Level) -> None:
        """The next drafts."""
        depths = growth.candidates.depths[level].tolist()
        at = list(zip(level.places.tolist(), depths, strict=True))
        own = np.array([[self._sure[place][depth]] for place, depth in at], np.float64)
        tokens = np.array([[self._tokens[place][depth]] for place, depth in at], np.int64)
        growth.add(level, Children(tokens.reshape(-1, 1), own.reshape(-1, 1)))

    def _learn(self, running: list[Decoding], accepted: list[int]) -> None:
        said = []
        for decoding, count in zip(running, accepted, strict=True):
            decoding.goes_on = decoding.number in self._looks
            said.append(_said(decoding, decoding.position - count - 1, count))
        assert self._candidates is not None
        self._candidates.learn(said)


def _drafts(decoding: Decoding) -> list[int]:
    """What the draft model would propose from here on, as far as it is right."""
    position = decoding.position
    run = int(decoding.run[position])
    right: list[int] = decoding.answer.token[position : position + run].tolist()
    return right + [WRONG] * (MAX_LENGTH - run)


def _said(decoding: Decoding, position: int, length: int) -> list[int]:
    """The target's tokens, in place of the first of ``length`` drafts and after each of them."""
    said: list[int] = decoding.answer.token[position : position + length + 1].tolist()
    return said


class Clairvoyant(FixedLength):
    """Drafts what will be accepted, as far as it pays at the value of time."""

    def __init__(self, replay: Replay, value_of_time: float) -> None:
        super().__init__(0)
        self._replay = replay
        self._value = value_of_time
        self._lengths: I64 = np.zeros(0, np.int64)

    def look(self, running: Sequence[Decoding]) -> None:
        """Be told the outcomes of the step about to run."""
        runs = np.array([min(int(one.run[one.position]), one.available) for one in running])
        best_value = -np.inf
        for depth in range(int(runs.max(initial=0)) + 1):
            lengths = np.minimum(runs, depth)
            num_tokens = len(runs) + int(lengths.sum())
            num_forwards = 0 if self._replay.is_lookup else depth
            value = num_tokens - self._value * self._replay.seconds(num_tokens, num_forwards)
            if value > best_value:
                self._lengths, best_value = lengths, value

    def choose(self, batch: DecodeBatch) -> Choice:
        return Choice.fixed(self._lengths, source="own")


@cache
def answers_of(tasks: tuple[str, ...], count: int | None) -> list[Answer]:
    """The first ``count`` answers of each of the tasks, in the order of recording."""
    answers = load()
    places = [
        place
        for task in tasks
        for place in [i for i, answer in enumerate(answers) if answer.task == task][:count]
    ]
    return [answers[place] for place in sorted(places)]


def replay_for(cell: Cell, seed: int) -> Replay:
    """The engine that drafts as the cell says."""
    return ConfidentReplay(cell, seed) if cell.confidences else Replay(cell, seed)


def daemon_for(cell: Cell) -> Steering:
    """A daemon that knows nothing, and whose policies come one step late."""
    lookup = cell.style == "lookup"
    limits = Limits(
        max_length=MAX_LENGTH,
        max_num_running=64,
        static_length=3,
        features=FEATURES[cell.style],
        drafts_known_first=lookup,
        confidences=cell.confidences,
    )
    return Steering.cold("lookup" if lookup else "draft_model", limits)
