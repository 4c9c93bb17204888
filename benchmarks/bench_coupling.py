"""Which acceptance do sampled drafts get: same noise, or rejection sampling?

Both leave the target's distribution untouched. With the *same noise* a draft is accepted when the
target draws the same token (sampling.py): output is then a function of the seed, whatever is
drafted. *Rejection sampling* (Leviathan et al. 2023) accepts a draft from q with probability
min(1, p / q), that is with sum_x min(p(x), q(x)) on average, the best that any rule can do.

The target decodes with sampling; at each of its positions both distributions are compared, at
depth 1 (the draft model sees the target's own context). Writes build/figures/coupling.json.

Run: python benchmarks/bench_coupling.py [--num-tokens 120]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from figures import record

from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.events import Finished
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.sampling import Draws, sample
from smartspec.engine_adapter.reference.sequence import Request, SamplingParams
from smartspec.engine_adapter.reference.worker import Worker

SETTINGS = (
    {"temperature": 0.5},
    {"temperature": 0.8},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.9},
)
PROMPTS = (
    "Explain in a few sentences how a refrigerator keeps food cold.",
    "Write a short story about a lighthouse keeper and a storm.",
    "Rewrite politely: send me the report now, I have waited long enough.",
    "Translate to French: The train leaves at nine from platform two.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "Summarise: The council met on Tuesday. It agreed to repair the bridge before winter.",
    "A shop sells pens at 3 for 2 dollars. How much do 12 pens cost? Think step by step.",
    "List five unusual uses of a paper clip.",
)


def compare(
    target: models.LoadedModel,
    draft: ModelRunner,
    runner: ModelRunner,
    setting: dict[str, float],
    num_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Acceptance under both rules, over all positions of all answers."""
    worker = Worker(
        target.model,
        max_num_running=len(PROMPTS),
        max_model_len=256,
        eos_token_ids=target.eos_token_ids,
    )
    params = [SamplingParams(**setting, seed=seed + i) for i in range(len(PROMPTS))]  # type: ignore[arg-type]
    prompts = []
    for prompt, sampling in zip(PROMPTS, params, strict=True):
        text = target.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        prompts.append(target.tokenizer(text, add_special_tokens=False)["input_ids"])
        worker.add_request(Request(prompts[-1], num_tokens, sampling=sampling))
    answers: dict[int, list[int]] = {}
    while worker.has_work:
        for event in worker.step().events:
            if isinstance(event, Finished):
                answers[event.id - 1] = event.tokens
    agree, overlap, distance = [], [], []
    for i, answer in answers.items():
        tokens = prompts[i] + answer[:-1]
        segment = Segment(0, 0, tokens, len(answer))
        draws = Draws.of([(params[i], seed + i, range(len(prompts[i]), len(tokens) + 1))])
        logits = [model.forward([segment]) for model in (runner, draft)]
        drawn = [sample(x, draws) for x in logits]
        agree.append((drawn[0] == drawn[1]).numpy())
        p, q = (probabilities(x, params[i]) for x in logits)
        overlap.append(torch.minimum(p, q).sum(-1).numpy())
        distance.append(1 - overlap[-1])
    agreed, overlapped = np.concatenate(agree), np.concatenate(overlap)
    bound = np.concatenate([(1 - d) / (1 + d) for d in distance])
    return {
        **setting,
        "num_positions": len(agreed),
        "same_noise": float(agreed.mean()),
        "same_noise_standard_error": float(agreed.std() / np.sqrt(len(agreed))),
        "rejection": float(overlapped.mean()),
        "lower_bound_of_same_noise": float(bound.mean()),
    }


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution drawn from: temperature, then top-p."""
    p = (logits.float() / params.temperature).softmax(-1)
    if params.top_p < 1:
        value, token = p.sort(-1, descending=True)
        value = value.masked_fill(value.cumsum(-1) - value >= params.top_p, 0.0)
        p = torch.zeros_like(p).scatter(-1, token, value)
        p /= p.sum(-1, keepdim=True)
    return p


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-tokens", type=int, default=120, help="per answer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    target = models.load()
    thin = models.without_layers(target.model, models.DEFAULT_DRAFT_DROP_LAYERS)
    draft, runner = ModelRunner(thin, 1, 256), ModelRunner(target.model, 1, 256)
    print(
        "acceptance of one sampled draft, target SmolLM2-135M-Instruct, draft 25 of its 30 layers"
    )
    print(f"{'setting':<32}{'positions':>10}{'same noise':>18}{'rejection':>11}{'lost':>8}")
    rows = []
    for setting in SETTINGS:
        row = compare(target, draft, runner, dict(setting), args.num_tokens, args.seed)
        rows.append(row)
        name = ", ".join(f"{key} {value}" for key, value in setting.items())
        noise = f"{row['same_noise']:.3f} ± {row['same_noise_standard_error']:.3f}"
        lost = row["rejection"] - row["same_noise"]
        print(
            f"{name:<32}{row['num_positions']:>10}{noise:>18}{row['rejection']:>11.3f}{lost:>8.3f}"
        )
    flat = {
        "_".join(str(part).replace(".", "_") for item in setting.items() for part in item)
        + f"_{name}": value
        for setting, row in zip(SETTINGS, rows, strict=True)
        for name, value in row.items()
        if name not in setting
    }
    record("coupling", flat, seed=args.seed)


if __name__ == "__main__":
    main()
