"""vLLM under SmartSpec: scheduler classes for ``--scheduler-cls``.

    vllm serve MODEL --speculative-config '{...}' \\
        --scheduler-cls smartspec.engine_adapter.vllm.SmartSpecScheduler

Loaded at first use, so that `doctor` runs where vLLM does not import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smartspec.engine_adapter.vllm.scheduler import (
        SmartSpecAsyncScheduler,
        SmartSpecScheduler,
    )

__all__ = ["SmartSpecAsyncScheduler", "SmartSpecScheduler"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from smartspec.engine_adapter.vllm import scheduler

    return getattr(scheduler, name)
