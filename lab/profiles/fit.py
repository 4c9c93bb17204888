"""Make the simulator's profiles: ``SMARTSPEC_DATA=... python -m smartspec.lab.profiles.fit``.

Dense layers become a table at the sizes that passes are padded to, as far as their source goes:
beyond it the last slope goes on, and the profile says from where (label "extrapolated"). Attention
becomes a few coefficients, fitted by least squares of the relative error. The error told is that of
whole steps, over random steps that the fit has not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from smartspec.engine_adapter.simulator import profile
from smartspec.engine_adapter.simulator.profile import Draft, Profile, Source
from smartspec.lab.profiles import machines
from smartspec.lab.profiles.machines import Chunk, Machine, Step
from smartspec.lab.public_data import data_folder

TABLE = (1, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 448, 512)
TABLE_BEYOND = (640, 768, 1024, 1536, 2048, 4096)
#: Bytes of weights and layers: Llama-68M, Llama-160M, Llama-3.2-1B; one layer of an 8B with a
#: reduced vocabulary of 32,000, as EAGLE-3's heads are.
DRAFTS = {
    "68m": (0.136e9, 2),
    "160m": (0.32e9, 12),
    "1b": (2.47e9, 16),
    "eagle": (0.70e9, 1),
}


def drafts(bandwidth: float, flops: float) -> dict[str, Draft]:
    """Drafters on a GPU: weights over bandwidth, as machines.py reckons (datasheet)."""
    return {
        name: Draft(
            fixed_s=1e-4,
            forward_s=_round(weight_bytes / (0.8 * bandwidth) + num_layers * 1.6e-5),
            token_s=_round(weight_bytes / (0.5 * flops)),
            note=f"datasheet: {weight_bytes / 1e9:g} GB over the bandwidth, {num_layers} layers",
        )
        for name, (weight_bytes, num_layers) in DRAFTS.items()
    }


def _random_steps(machine: Machine, rng: np.random.Generator, count: int) -> list[Step]:
    steps = []
    for _ in range(count):
        size = int(np.exp(rng.uniform(0, np.log(machine.max_num_running))))
        context = int(size * np.exp(rng.uniform(np.log(64), np.log(3000))))
        context = min(context, machine.kv_tokens)
        chunks: tuple[Chunk, ...] = ()
        if rng.random() < 0.4:
            tokens = int(rng.integers(16, machine.chunk_tokens))
            chunks = (Chunk(tokens, int(rng.integers(0, 2)) * int(rng.integers(0, 2000))),)
        steps.append(Step(size, size * int(rng.integers(1, 7)), context, chunks))
    return steps


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def relative_fit(rows: list[list[float]], seconds: list[float]) -> list[float]:
    """Coefficients >= 0 of the least squares of relative errors; what turns negative is 0."""
    x, y = np.array(rows), np.array(seconds)
    x, y = x / y[:, None], np.ones(len(y))
    used = list(range(x.shape[1]))
    while True:
        found = np.linalg.lstsq(x[:, used], y, rcond=None)[0]
        if (found >= 0).all():
            break
        used.pop(int(np.argmin(found * x[:, used].mean(axis=0))))
    coefficients = np.zeros(x.shape[1])
    coefficients[used] = found
    return [_round(value) for value in coefficients]


def fit(
    machine: Machine,
    target: str,
    accelerator: str,
    drafts: dict[str, Draft],
) -> Profile:
    """The profile of ``machine``."""
    rng = np.random.default_rng(0)
    term = {one.name: one for one in machine.terms}
    last = term["dense"].measured_to or TABLE_BEYOND[-1]
    table = tuple(n for n in TABLE + TABLE_BEYOND if n <= last)
    dense_s = [term["dense"].seconds(Step(0, n)) for n in table]
    if "all_reduce" in term:
        dense_s = [
            s + term["all_reduce"].seconds(Step(0, n)) for s, n in zip(dense_s, table, strict=True)
        ]
    steps = _random_steps(machine, rng, 800)
    decode = relative_fit(
        [[1.0, step.num_decoding, step.context_tokens] for step in steps],
        [term["decode_attention"].seconds(step) for step in steps],
    )
    with_chunks = [step for step in steps if step.chunks]
    chunk = relative_fit(
        [
            [1.0, c.num_tokens, c.num_tokens * (c.num_before + c.num_tokens / 2)]
            for step in with_chunks
            for c in step.chunks
        ],
        [max(term["prefill_attention"].seconds(step), 1e-6) for step in with_chunks],
    )
    head = term["lm_head"].seconds
    row_s = (head(Step(256, 256)) - head(Step(1, 1))) / 255
    dense_s = [s + head(Step(1, 1)) - max(row_s, 0.0) for s in dense_s]
    host, host_request = 0.0, 0.0
    if "host" in term:
        many = machine.max_num_running
        low, high = term["host"].seconds(Step(1, 1)), term["host"].seconds(Step(many, many))
        host_request = max((high - low) / (many - 1), 0.0)
        host = low - host_request
    sources = [Source(one.name, one.source, one.note) for one in machine.terms]
    sources += [
        Source(one.name, "extrapolated", f"passes beyond {one.measured_to:,}: the last slope")
        for one in machine.terms
        if one.measured_to is not None
    ]
    made = Profile(
        name=machine.name,
        target=target,
        accelerator=accelerator,
        graph_sizes=machine.graph_sizes,
        dense_tokens=table,
        dense_s=tuple(_round(s) for s in dense_s),
        decode_fixed_s=decode[0],
        decode_request_s=decode[1],
        decode_context_s=decode[2],
        chunk_fixed_s=chunk[0],
        chunk_token_s=chunk[1],
        chunk_pair_s=chunk[2],
        row_s=_round(max(row_s, 0.0)),
        host_s=_round(host),
        host_request_s=_round(host_request),
        drafts=drafts,
        max_num_running=machine.max_num_running,
        kv_tokens=machine.kv_tokens,
        chunk_tokens=machine.chunk_tokens,
        fit_error_mean=0.0,
        fit_error_p95=0.0,
        sources=tuple(sources),
    )
    errors = []
    for step in _random_steps(machine, rng, 800):
        chunks = tuple(profile.Chunk(*one) for one in step.chunks)
        ours = made.target_seconds(
            step.num_decoding, step.num_verify_tokens, step.context_tokens, chunks
        )
        errors.append(abs(ours / machine.seconds(step) - 1))
    return msgspec.structs.replace(
        made,
        fit_error_mean=_round(float(np.mean(errors))),
        fit_error_p95=_round(float(np.quantile(errors, 0.95))),
    )


def mixture_of_experts() -> Profile:
    """Two H100, an 8 x 7B mixture: every term from the datasheet.

    The experts that n tokens touch, 2 of 8 each, are ``8 (1 - (3/4)^n)`` on average: weights are
    read for those, so verification's cost is concave until all are read.
    """
    experts_bytes, other_bytes, bandwidth, flops = 90.2e9, 3.2e9, 2 * 3.35e12, 2 * 989e12
    table = (1, 2, 3, 4, 6, 8, 12, *TABLE[2:], *TABLE_BEYOND)

    def dense(n: int) -> float:
        read = other_bytes + experts_bytes * (1 - 0.75**n)
        compute = n * 2 * 12.9e9 / (0.5 * flops)
        return max(read / (0.8 * bandwidth), compute) + 2 * 32 * 1e-5

    kv_bytes = 32 * 2 * 8 * 128 * 2
    pair_s = 32 * 4 * 32 * 128 / (0.4 * flops)
    note = "bytes over 80% of the bandwidth, or operations at half the peak"
    return Profile(
        "h100x2_moe", "8 x 7B mixture of experts", "2 x H100", machines.GRAPH_SIZES, table,
        tuple(_round(dense(n)) for n in table), 2e-4, 0.0, _round(kv_bytes / (0.8 * bandwidth)),
        1e-4, 0.0, _round(pair_s), 0.0, 0.0, 0.0,
        drafts(machines.H100_BANDWIDTH, machines.H100_FLOPS), 256, 400_000, 1024, 0.0, 0.0,
        (Source("all", "datasheet", note),),
    )  # fmt: skip


A100 = machines.A100_BANDWIDTH, machines.A100_FLOPS
H100 = machines.H100_BANDWIDTH, machines.H100_FLOPS
RTX4090 = machines.RTX4090_BANDWIDTH, machines.RTX4090_FLOPS
MADE: tuple[tuple[Callable[[Path], Machine], str, str, tuple[float, float]], ...] = (
    (machines.a100_llama2_7b, "Llama-2-7B", "A100", A100),
    (machines.a100_llama2_70b_tp4, "Llama-2-70B", "4 x A100", A100),
    (machines.h100_llama31_8b, "Llama-3.1-8B", "H100", H100),
    (machines.rtx4090_llama31_8b, "Llama-3.1-8B", "RTX 4090", RTX4090),
)


def main() -> None:
    """Write all profiles into the package."""
    data = data_folder() / "profiles"
    profile.FOLDER.mkdir(exist_ok=True)
    made = [fit(make(data), target, gpu, drafts(*sheet)) for make, target, gpu, sheet in MADE]
    for one in [*made, mixture_of_experts()]:
        path = profile.FOLDER / f"{one.name}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(one), indent=1) + b"\n")
        print(f"{one.name}: mean error {one.fit_error_mean:.1%}, p95 {one.fit_error_p95:.1%}")


if __name__ == "__main__":
    main()
