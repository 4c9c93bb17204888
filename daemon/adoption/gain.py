"""What SmartSpec gains over no speculation and over the engine's own setting, with an interval.

What would have happened otherwise is never seen, but predicted: at every step the models say what
goodput (tokens per second) the batch of that step would have had at another setting. Over a block
of steps, some seconds long, each alternative a has the index

    x_a = log(tokens emitted / sum over steps of seconds * goodput predicted of a)

that is, what was measured over what the model expects of a *for the same batches*: load cancels,
as far as the model knows what load does. A step's prompts count as the tokens that their seconds
are worth (`Decision.prompts`): who drafts long gets more tokens out of a step, and fewer prompts
done. In blocks that SmartSpec steered, x_a is its gain over a if the model is right about a. In
the few blocks in which the engine really ran a (trial.py), x_a is how wrong the model is about a:
its *bias*. The estimate is the difference of the two,

    log gain = mean of x_a over blocks of SmartSpec - mean of x_a over blocks of a

a difference of two measured rates with the model as control variate: an error of the model that is
the same in both cancels, and where a was never run the interval is that of the model.

The bias has a normal-gamma prior: as if one check had shown none, with the deviation that the
models claim for themselves and `MODEL_ERROR`, worth `PRIOR_CHECKS` degrees of freedom. Checks may
be rare, and what they showed grows old: one is worth a third of itself after `BIAS_LASTS_S` of
steps, so that without new ones estimate and interval return to those of the models.

While nothing is steered (observe) no block of SmartSpec exists: gain is then predicted over
predicted, with the models' own deviation and `MODEL_ERROR`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from smartspec.daemon.decision import Arm

ALTERNATIVES = (Arm.NONE, Arm.OWN)
MEMORY_BLOCKS = 30.0  #: of what is measured and predicted at every block
MEMORY_CHECKS = 10.0  #: blocks of an alternative that its bias is remembered from
BIAS_LASTS_S = 3600.0  #: of steps, after which what a check showed counts exp(-1)
MODEL_ERROR = 0.05  #: deviation of log goodput that the models do not know of themselves
PRIOR_CHECKS = 4.0  #: degrees of freedom of that
COMPARISONS_KEPT = 64
LEAST_COMPARISONS = 3  #: for an interval
NORMAL_95 = 1.959964
MOST_LOG = 14.0  #: of a gain or its bounds: beyond a million times nothing is known


class Interval(NamedTuple):
    """A gain as a ratio less 1, and where it lies with 95% confidence."""

    value: float
    low: float
    high: float

    @classmethod
    def of_log(cls, centre: float, spread: float) -> Interval:
        return cls(*(_as_gain(x) for x in (centre, centre - spread, centre + spread)))


def _as_gain(log_ratio: float) -> float:
    """A ratio less 1, of its logarithm; as far as anybody may want to know it."""
    return math.expm1(min(max(log_ratio, -MOST_LOG), MOST_LOG))


def student_95(freedom: float) -> float:
    """The 97.5% quantile of Student's t, for 2 degrees of freedom and more, to 4%.

    Cornish-Fisher expansion about the normal quantile (Abramowitz and Stegun 26.7.5).

    >>> round(student_95(4.0), 2), round(student_95(30.0), 3)
    (2.77, 2.042)
    """
    z, v = NORMAL_95, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


class Tally:
    """Steps of a block: what they brought, and what was expected of them otherwise."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.seconds = 0.0
        self.tokens = 0.0
        self.chosen = 0.0  #: tokens predicted of the optimum
        self.otherwise = dict.fromkeys(ALTERNATIVES, 0.0)  #: tokens predicted of alternatives

    def add(
        self, step_s: float, tokens: float, chosen: float, otherwise: Mapping[Arm, float]
    ) -> None:
        """Take in a step: ``tokens`` emitted; ``chosen``, ``otherwise`` in tokens per second."""
        self.num_steps += 1
        self.seconds += step_s
        self.tokens += tokens
        self.chosen += step_s * chosen
        for arm, goodput in otherwise.items():
            self.otherwise[arm] += step_s * goodput

    @property
    def is_usable(self) -> bool:
        return min(self.tokens, self.chosen, *self.otherwise.values()) > 0.0

    @property
    def goodput(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def index(self, alternative: Arm) -> float:
        """log(measured / predicted of ``alternative``)."""
        return math.log(self.tokens / self.otherwise[alternative])

    def predicted(self, alternative: Arm) -> float:
        """log(predicted of the optimum / predicted of ``alternative``)."""
        return math.log(self.chosen / self.otherwise[alternative])


class Discounted:
    """Mean and variance of values, the older the less they count.

    >>> values = Discounted(memory=1e9)
    >>> for x in (1.0, 2.0, 3.0): values.add(x)
    >>> round(values.mean, 3), round(values.variance_of_mean, 3), round(values.count, 3)
    (2.0, 0.333, 3.0)
    """

    def __init__(self, memory: float) -> None:
        self._keep = 1.0 - 1.0 / memory
        self._weight = 0.0
        self._squares = 0.0  #: of weights
        self.mean = 0.0
        self.deviations = 0.0  #: weighted sum of squares about the mean

    def add(self, value: float) -> None:
        keep = self._keep
        self._weight = keep * self._weight + 1.0
        self._squares = keep * keep * self._squares + 1.0
        off = value - self.mean
        self.mean += off / self._weight
        self.deviations = keep * self.deviations + off * (value - self.mean)

    def fade(self, keep: float) -> None:
        """Be worth this share of the values that these were worth."""
        self._weight *= keep
        self._squares *= keep
        self.deviations *= keep

    @property
    def count(self) -> float:
        """Equally weighted values that these are worth."""
        return self._weight**2 / self._squares if self._squares else 0.0

    @property
    def squares(self) -> float:
        """Sum of squares about the mean, of `count` equally weighted values."""
        return self.deviations * self.count / self._weight if self._weight else 0.0

    @property
    def variance_of_mean(self) -> float:
        """inf for a single value."""
        freedom = self._weight - self._squares / self._weight if self._weight else 0.0
        if freedom < 1e-9:
            return math.inf
        return self.deviations / freedom * self._squares / self._weight**2


class Comparisons:
    """Differences of log goodput between neighbouring blocks: SmartSpec's less an alternative's.

    Each is corrected by what the models say of the two blocks' loads. Which of the two came first
    was drawn by lot, so that loads differ by nothing in the long run: what corrections come to on
    average is as likely an error of the models, and the interval is widened by it.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[float, float]] = deque(maxlen=COMPARISONS_KEPT)
        self.num_made = 0

    def add(self, difference: float, correction: float = 0.0) -> None:
        """Take in a pair: its difference as corrected, and by how much it was."""
        self.num_made += 1
        self._kept.append((difference, correction))

    def interval(self) -> Interval | None:
        """The mean gain of those kept; None while there are too few."""
        n = len(self._kept)
        if n < LEAST_COMPARISONS:
            return None
        mean, corrected = (sum(values) / n for values in zip(*self._kept, strict=True))
        variance = sum((x - mean) ** 2 for x, _ in self._kept) / (n - 1)
        return Interval.of_log(mean, student_95(n - 1) * math.sqrt(variance / n + corrected**2))


class GainEstimator:
    """One engine's gain, from the blocks it ran.

    Parameters
    ----------
    own_is_none : whether the engine's own setting is not to speculate: then who runs one runs both
    """

    def __init__(self, own_is_none: bool = False) -> None:
        self._runs: dict[Arm, tuple[Arm, ...]] = {Arm.NONE: (Arm.NONE,), Arm.OWN: (Arm.OWN,)}
        if own_is_none:
            self._runs[Arm.OWN] = ALTERNATIVES
        self._measured = {arm: Discounted(MEMORY_BLOCKS) for arm in ALTERNATIVES}
        self._predicted = {arm: Discounted(MEMORY_BLOCKS) for arm in ALTERNATIVES}
        self._bias = {arm: Discounted(MEMORY_CHECKS) for arm in ALTERNATIVES}
        self._model_std = dict.fromkeys(ALTERNATIVES, 0.0)
        self.comparisons = {arm: Comparisons() for arm in ALTERNATIVES}

    @property
    def is_measured(self) -> bool:
        """Whether SmartSpec has steered any block."""
        return self._measured[Arm.OWN].count > 0

    def note_block(self, arm: Arm, tally: Tally, model_std: Mapping[Arm, float]) -> None:
        """Take in a usable block run under ``arm``.

        ``model_std``: deviation of the log of the predicted gain over each alternative, as the
        models know it.
        """
        for other in ALTERNATIVES:
            self._predicted[other].add(tally.predicted(other))
            self._model_std[other] = model_std[other]
            self._bias[other].fade(math.exp(-tally.seconds / BIAS_LASTS_S))
            if arm is Arm.SMARTSPEC:
                self._measured[other].add(tally.index(other))
            elif other in self._runs[arm]:
                self._bias[other].add(tally.index(other))

    def note_comparison(self, alternative: Arm, smartspec: Tally, other: Tally) -> float:
        """Take in two neighbouring blocks; returns the difference of log goodput."""
        difference = smartspec.index(alternative) - other.index(alternative)
        correction = difference - math.log(smartspec.goodput / other.goodput)
        for arm in self._runs[alternative]:
            self.comparisons[arm].add(difference, correction)
        return difference

    def over(self, alternative: Arm) -> Interval | None:
        """The gain over ``alternative`` of late; None before the first block."""
        if not self._predicted[alternative].count:
            return None
        claimed = self._claimed(alternative)
        measured, bias = self._measured[alternative], self._bias[alternative]
        if not measured.count:
            return self._foreseen(alternative)
        n = bias.count
        scale = PRIOR_CHECKS * claimed + n / (n + 1.0) * bias.mean**2 + bias.squares
        variance = scale / (PRIOR_CHECKS + n) / (n + 1.0)
        if math.isfinite(measured.variance_of_mean):
            variance += measured.variance_of_mean
        centre = measured.mean - n / (n + 1.0) * bias.mean
        return Interval.of_log(centre, student_95(PRIOR_CHECKS + n) * math.sqrt(variance))

    def _claimed(self, alternative: Arm) -> float:
        """Variance of a log gain before anything was checked."""
        return self._model_std[alternative] ** 2 + MODEL_ERROR**2

    def _foreseen(self, alternative: Arm) -> Interval:
        """The gain of the lengths that would be chosen now, and of what may turn out better.

        An engine that always runs its own length shows little of what others cost and bring, and
        what is chosen from that differs little from what it runs. So the upper end is also that of
        no speculation, which SmartSpec is free to choose once it knows.
        """
        freedom = student_95(PRIOR_CHECKS)
        predicted = {arm: self._predicted[arm].mean for arm in ALTERNATIVES}
        interval = Interval.of_log(
            predicted[alternative], freedom * math.sqrt(self._claimed(alternative))
        )
        none = predicted[alternative] - predicted[Arm.NONE]
        most = _as_gain(none + freedom * math.sqrt(self._claimed(Arm.NONE)))
        return (
            interval
            if alternative is Arm.NONE
            else interval._replace(high=max(interval.high, most))
        )

    def bias(self, alternative: Arm) -> float | None:
        """Goodput of ``alternative``: measured over predicted, less 1; None: never run."""
        bias = self._bias[alternative]
        return _as_gain(bias.mean) if bias.count else None
