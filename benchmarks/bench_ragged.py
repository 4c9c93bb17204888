"""What several lengths in one step cost the reference worker, at equal numbers of tokens.

Attention reads rows in padded groups: a few long drafts would make all rows of their group as wide.
The default model in fp32, one thread, 16 requests with contexts of 150 to 450 tokens; every layout
in turn, processor time, medians. ``*_over_even``: over that of the same number of tokens at one
length, interpolated between lengths 2, 3 and 4.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from figures import record
from transformers import AutoModelForCausalLM

from smartspec.engine_adapter.reference.model import default_model_path
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment

BATCH = 16
CONTEXT = [150 + 20 * i for i in range(BATCH)]
EVEN = {f"even_{k}": [k] * BATCH for k in (2, 3, 4)}
RAGGED = {
    "sorted": [8] * 4 + [2] * 8 + [0] * 4,
    "mixed": [8, 0, 2, 2] * 4,
    "few_long": [8, 1, 1, 1] * 4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=torch.float32)
    runner = ModelRunner(model.eval(), BATCH, 1024)
    rng = np.random.default_rng(0)
    layouts = EVEN | RAGGED
    taken: dict[str, list[float]] = {name: [] for name in layouts}
    for _ in range(args.repetitions):
        for name, lengths in layouts.items():
            segments = [
                Segment(row, start, rng.integers(0, 40_000, 1 + k).tolist(), 1 + k)
                for row, (start, k) in enumerate(zip(CONTEXT, lengths, strict=True))
            ]
            began = time.thread_time()
            runner.forward(segments)
            taken[name].append(time.thread_time() - began)
    median_ms = {name: 1e3 * float(np.median(values[2:])) for name, values in taken.items()}
    figures = {f"{name}_ms": value for name, value in median_ms.items()}
    totals = [sum(lengths) for lengths in EVEN.values()]
    for name, lengths in RAGGED.items():
        even_ms = np.interp(sum(lengths), totals, [median_ms[even] for even in EVEN])
        figures[f"{name}_over_even"] = median_ms[name] / float(even_ms)
    record("ragged", figures)


if __name__ == "__main__":
    main()
