"""What packed matrices (packed_linear.py) bring a pass of few tokens: one request, batch 1.

The default model in fp32 after 300 tokens, as the worker runs it and with its matrices as they are
stored, passes of 1 to 16 tokens in turns, medians. ``packed_4_over_1``: what verifying three drafts
costs, over a step without any.

Run: python benchmarks/bench_packed.py [--repetitions 15] [--threads 2]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from figures import record
from torch import nn

from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.packed_linear import PackedLinear

CONTEXT = 300
SIZES = (1, 2, 3, 4, 6, 9, 16)


def unpack(model: nn.Module) -> None:
    """Undo what a runner did to a model."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, PackedLinear):
                out_features, in_features = child.weight.shape
                plain = nn.Linear(in_features, out_features, child.bias is not None, "meta")
                plain.weight, plain.bias = child.weight, child.bias
                setattr(parent, name, plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokens = np.random.default_rng(0).integers(0, 40_000, CONTEXT).tolist()
    runners = {}
    for name in ("plain", "packed"):
        runners[name] = ModelRunner(models.load(device="cpu").model, 1, CONTEXT + max(SIZES))
        runners[name].forward([Segment(0, 0, tokens, 1)])
    unpack(runners["plain"].model)
    taken: dict[str, list[float]] = {f"{name}_{n}": [] for name in runners for n in SIZES}
    for _ in range(args.repetitions):
        for n in SIZES:
            for name, runner in runners.items():
                begin = time.perf_counter()
                runner.forward([Segment(0, CONTEXT, tokens[:n], n)])
                taken[f"{name}_{n}"].append(time.perf_counter() - begin)
    median_ms = {name: 1e3 * float(np.median(values)) for name, values in taken.items()}
    figures = {f"{name}_ms": value for name, value in median_ms.items()}
    for name in runners:
        figures[f"{name}_4_over_1"] = median_ms[f"{name}_4"] / median_ms[f"{name}_1"]
    record("packed", figures)


if __name__ == "__main__":
    main()
