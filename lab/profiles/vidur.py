"""Readers of vidur's profiles (github.com/microsoft/vidur, MIT), in CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from smartspec.lab.profiles.tables import Line


def dense_seconds(path: Path, tensor_parallel: int, num_layers: int) -> Line:
    """Seconds of all layers' operators but attention, by tokens; medians of ``*_mlp.csv``.

    The file has one layer's operators, and the embedding. Raises ValueError when the width was not
    profiled.
    """
    points: dict[int, float] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if int(row["num_tensor_parallel_workers"]) != tensor_parallel:
                continue
            milliseconds = {
                name.split(".")[1]: float(value)
                for name, value in row.items()
                if name.endswith(".median") and value
            }
            once = milliseconds.pop("emb")
            points[int(row["num_tokens"])] = 1e-3 * (once + num_layers * sum(milliseconds.values()))
    if not points:
        raise ValueError(f"{path.name}: no rows with {tensor_parallel} tensor-parallel workers")
    return Line(points)


def host_seconds(path: Path, model: str) -> Callable[[float], float]:
    """Seconds between two steps that the host needs, by requests in the batch.

    Scheduling, preparation of inputs, sampling and processing of outputs; medians.
    """
    names = ("schedule", "prepare_inputs_e2e", "sampler_e2e", "process_model_outputs")
    points: dict[int, float] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["model_name"] == model:
                total = sum(float(row[f"{name}_median"]) for name in names)
                points[int(row["batch_size"])] = 1e-3 * total
    if not points:
        raise ValueError(f"{path.name}: no rows of {model}")
    return Line(points)
