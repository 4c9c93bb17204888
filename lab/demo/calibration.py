"""What this machine can serve without speculation, so that loads mean the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smartspec.lab.demo.player import RequestRecord, StepRecord


@dataclass(frozen=True, slots=True)
class Calibration:
    """Capacity without speculation, and what it was worked out from."""

    capacity_requests_per_s: float  #: with the batch kept full by new requests
    capacity_tokens_per_s: float  #: the same in tokens of answers
    num_requests: int
    answer_tokens_mean: float
    prompt_tokens_mean: float
    full_step_s: float  #: a step with a full batch, its share of new prompts included
    single_step_s: float  #: a step with one request, no new prompts


def calibrate(
    requests: Sequence[RequestRecord], steps: Sequence[StepRecord], max_num_running: int
) -> Calibration:
    """Capacity from one burst of requests, decoded at length 0.

    A burst fills the batch and then empties it, so its own throughput is below what a steady stream
    would get. Its steps say what a step costs, ``c_0 + c_batch D + c_prefill P``, with D requests
    that decode and P prompt tokens (least squares). In a steady stream with all B places taken, a
    request has its place for a steps, one for its prompt (and first token) and a - 1 to decode;
    so r = B / a requests join per step, bring r p prompt tokens, and B - r decode:

        capacity = r / (c_0 + c_batch (B - r) + c_prefill r p)

    Raises ValueError when there are too few steps to tell.
    """
    decoding = [step for step in steps if step.lengths or step.num_prefill_tokens]
    num_tokens = sum(request.num_tokens for request in requests)
    if len(decoding) < 10 or num_tokens <= len(requests):
        raise ValueError(f"only {len(decoding)} steps and {num_tokens} tokens to calibrate on")
    batch = np.array([len(step.lengths) for step in decoding], np.float64)
    prefill = np.array([step.num_prefill_tokens for step in decoding], np.float64)
    seconds = np.array([step.step_s for step in decoding], np.float64)
    design = np.column_stack([np.ones_like(batch), batch, prefill])
    fixed, per_request, per_prefill = np.linalg.lstsq(design, seconds, rcond=None)[0].tolist()

    answer = num_tokens / len(requests)
    prompt = float(prefill.sum()) / len(requests)
    joining = max_num_running / answer
    full_s = fixed + per_request * (max_num_running - joining) + per_prefill * joining * prompt
    if not full_s > 0:
        raise ValueError(f"step times make no sense: a full step would take {full_s:.3g} s")
    capacity = joining / full_s
    return Calibration(
        capacity_requests_per_s=capacity,
        capacity_tokens_per_s=capacity * answer,
        num_requests=len(requests),
        answer_tokens_mean=answer,
        prompt_tokens_mean=prompt,
        full_step_s=full_s,
        single_step_s=fixed + per_request,
    )
