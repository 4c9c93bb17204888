"""What is a second of a step worth that carries prompts? Forms of the price, told the truth.

The schedule of bench_shift.py, its phases cut to 40 s, on seeds of its own; every policy knows the
true costs and probabilities, so that nothing but the price differs. Figures: latency over that of
`step`, geometric means over seeds. With B requests decoding, p whose prompts are in the step, w
waiting:

| form | the value of time |
|---|---|
| `step` | goodput of the step as it is: what maximises the step's own goodput |
| `prompt<w>` | the same, a token of a prompt counting as w of an answer's |
| `average` | tokens per second of the last 10 s |
| `beyond` | goodput over the seconds that the step takes beyond what its prompts add |
| `alone` | goodput of the batch without the prompts: the daemon's |
| `alone_present` | `alone` times (B + p + w) / B: a second costs all who are there |
| `step_present` | `step` times (B + p + w) / B |
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import kept_runs
import numpy as np
from bench_shift import MEASURES, SETTINGS, measures, set_up
from figures import record

from smartspec.engine_adapter.base import StepFacts
from smartspec.engine_adapter.optimum import at_price
from smartspec.lab.simulation.policies import Known, Told
from smartspec.lab.simulation.world import serve

FORMS = ("step", "prompt0.1", "prompt0.3", "average", "beyond", "alone", "alone_present",
         "step_present")  # fmt: skip
MEMORY_S = 10.0


class Priced(Told):
    """Informed, with a price of its own."""

    def __init__(self, draft: str, form: str) -> None:
        super().__init__(draft)
        self._form = form
        self._tokens = self._seconds = 0.0

    def report(self, facts: StepFacts) -> None:
        keep = math.exp(-facts.step_s / MEMORY_S)
        self._tokens = keep * self._tokens + float(facts.num_emitted.sum())
        self._seconds = keep * self._seconds + facts.step_s

    def value_of_time(self, step: Known) -> float:
        form, _, scaled = self._form.partition("_")
        if form == "average" and self._seconds > 0.1:
            price = self._tokens / self._seconds
        elif form == "alone":
            price = super().value_of_time(step)
        elif form == "beyond":
            size, prompts = step.ladder.size, step.num_prompt_tokens
            added_s = float(step.carrying.at(size + prompts) - step.alone.at(size))
            price = _fixed_point(step, lambda gain, seconds: gain / (seconds - added_s))
        else:
            worth = float(form.removeprefix("prompt") or 0) if form.startswith("prompt") else 0.0
            worth *= step.num_prompt_tokens
            price = _fixed_point(step, lambda gain, seconds: (gain + worth) / seconds)
        return price * self._present(step) if scaled else price

    def _present(self, step: Known) -> float:
        """All requests there are, per request that decodes."""
        present = self.engine.present
        assert present is not None
        return 1.0 + (len(present.chunks) + self.engine.num_waiting) / step.ladder.size


def _fixed_point(step: Known, rate: Callable[[float, float], float]) -> float:
    """The greatest ``rate`` of gain and seconds, by Dinkelbach's iteration."""
    price = 0.0
    while True:
        given = step.ladder, price, [step.carrying], step.draft, step.num_prompt_tokens
        found = at_price(*given).choice
        better = rate(found.gain, found.seconds)
        if better <= price * (1 + 1e-9):
            return price
        price = better


def play(setting: str, limit: int, seed: int, form: str, phase_s: float) -> dict[str, float]:
    """Both measures of a form of the price."""
    cell, phase = set_up(setting, limit, seed, phase_s)
    return measures(serve(Priced(cell.draft, form), cell), phase)


def main() -> None:
    parser = kept_runs.parser(__doc__, SETTINGS, (64, 256), seeds=2, first_seed=100, phase_s=40.0)
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    options = parser.parse_args()
    forms = dict.fromkeys(("step", *options.forms))
    found, cells, seeds = kept_runs.play_all("price", play, forms, options)
    figures: dict[str, float] = {"num_seeds": options.seeds, "phase_s": options.phase_s}
    for form, (measured, short) in itertools.product(forms, MEASURES.items()):
        logs = []
        for setting, limit in cells:
            ratios = [
                found[setting, limit, seed, form][measured]
                / found[setting, limit, seed, "step"][measured]
                for seed in seeds
            ]
            logs.append(float(np.mean(np.log(ratios))))
            figures[f"{setting}_{limit}_{short}_{form}_vs_step"] = math.exp(logs[-1])
        figures[f"{short}_{form}_vs_step"] = math.exp(float(np.mean(logs)))
    record("price", figures, seed=options.first_seed)


if __name__ == "__main__":
    main()
