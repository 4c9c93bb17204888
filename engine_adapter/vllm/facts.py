"""What vLLM says of itself before its first step, and what speaks against steering it."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from smartspec.engine_adapter.base import FEATURE_TOKEN_ACCEPTANCE
from smartspec.engine_adapter.lengths import RAGGED, UNIFORM
from smartspec.engine_adapter.messages import (
    MAX_BATCH,
    MAX_LENGTH,
    Fingerprint,
    Hello,
    Limits,
)
from smartspec.engine_adapter.vllm import compatibility
from smartspec.engine_adapter.vllm.settings import Settings

LONGEST_TEXT = 200


class Method(NamedTuple):
    """What kind of drafter a speculation method is."""

    is_lookup: bool  #: drafts cost next to nothing, and exist before lengths are chosen
    one_pass: bool = False  #: all drafts of a request come from a single pass
    keeps_up: bool = False  #: a first pass is run at length 0 too, for the drafter's KV cache
    fresh_lists: bool = False  #: what it finds is in lists that nobody else keeps


#: Methods of vLLM's ``speculative_config``; others draft one token per pass, like eagle and mtp.
METHODS = {
    "ngram": Method(is_lookup=True, fresh_lists=True),
    "suffix": Method(is_lookup=True),
    "custom_class": Method(is_lookup=True),  # it is not told a length
    "medusa": Method(is_lookup=False, one_pass=True),
    "ngram_gpu": Method(is_lookup=False, one_pass=True),  # drafts are not known when scheduling
    "dflash": Method(is_lookup=False, one_pass=True),
}
SEQUENTIAL = Method(is_lookup=False, keeps_up=True)


def method_of(config: Any) -> Method:
    """The kind of ``vllm_config``'s drafter."""
    return METHODS.get(str(config.speculative_config.method), SEQUENTIAL)


def refusal(config: Any) -> str | None:
    """Why an engine of this configuration is left alone; None: it can be steered."""
    speculative = config.speculative_config
    if speculative is None or not config.num_speculative_tokens:
        return "no speculation is configured (--speculative-config)"
    if config.parallel_config.data_parallel_size > 1:
        # Each rank has a scheduler of its own; of a mixture of experts all ranks must run the
        # same passes, and would wait for ever for one that drafts less often than they do. Of
        # other models vLLM has told each rank by now that it is alone: see `_name`.
        return "data_parallel_size > 1: ranks that disagree on a length can wait for each other"
    if config.model_config.runner_type != "generate":
        return f"runner type {config.model_config.runner_type!r} does not generate"
    if getattr(config.model_config, "is_diffusion", False):
        return "a diffusion model has no draft tokens to cut"
    if getattr(config.model_config, "has_inner_state", False):
        # vLLM fits a step's tokens to where that state may be cut; not tried with other lengths.
        return "a model with recurrent state (Mamba) has not been tried"
    if config.num_speculative_tokens > MAX_LENGTH:
        return f"num_speculative_tokens > {MAX_LENGTH}"
    if config.scheduler_config.max_num_seqs > MAX_BATCH:
        return f"--max-num-seqs over {MAX_BATCH}"
    return None


def hello(config: Any, settings: Settings) -> Hello:
    """The introduction of an engine of this configuration (one that `refusal` lets through)."""
    model, speculative = config.model_config, config.speculative_config
    method = method_of(config)
    graph_sizes = _graph_sizes(config)
    return Hello(
        engine=_name(config, settings),
        # The one place where the time of day is right: it must differ after a reboot.
        epoch=time.time_ns(),
        fingerprint=Fingerprint(
            target=_text(model.model),
            proposer=_text(speculative.method),
            draft=_text(getattr(speculative, "model", None) or ""),
            engine="vllm",
            engine_version=_text(compatibility.version()),
            accelerator=_text(_device_name()),
            parallelism=_parallelism(config.parallel_config),
            dtype=_dtype(config),
            attention_backend=_attention_backend(config),
        ),
        limits=Limits(
            max_length=config.num_speculative_tokens,
            max_num_running=config.scheduler_config.max_num_seqs,
            static_length=config.num_speculative_tokens,
            features=(FEATURE_TOKEN_ACCEPTANCE,) if method.is_lookup else (),
            modes=_modes(settings.lengths, graph_sizes),
            graph_sizes=graph_sizes,
            drafts_known_first=method.is_lookup,
            keeps_up=method.keeps_up,
        ),
    )


def _name(config: Any, settings: Settings) -> str:
    """The engine's own; replicas that vLLM runs beside each other share their settings."""
    name = settings.engine or f"vllm-{_name_of(config.model_config)}"
    rank = getattr(config.parallel_config, "data_parallel_index", 0)
    return f"{name}-dp{rank}" if rank else name


def _dtype(config: Any) -> str:
    """Of weights and KV cache, as far as that decides what a step costs."""
    model = config.model_config
    parts = [str(model.dtype).removeprefix("torch.")]
    if quantization := getattr(model, "quantization", None):
        parts.append(str(quantization))
    kv_cache = str(getattr(config.cache_config, "cache_dtype", "auto"))
    if kv_cache != "auto":
        parts.append(f"kv {kv_cache}")
    return _text(" ".join(parts))


def _modes(lengths: str, graph_sizes: tuple[int, ...]) -> tuple[str, ...]:
    if lengths == "auto":
        lengths = "both" if graph_sizes else RAGGED
    return (RAGGED, UNIFORM) if lengths == "both" else (lengths,)


def _text(value: object) -> str:
    return str(value)[-LONGEST_TEXT:]


def _name_of(model: Any) -> str:
    served = getattr(model, "served_model_name", None) or model.model
    if isinstance(served, list | tuple):
        served = served[0]
    name = str(served).rstrip("/").rsplit("/", 1)[-1]
    return "".join(c for c in name if c.isprintable())[-LONGEST_TEXT:] or "model"


def _device_name() -> str:
    from vllm.platforms import current_platform

    try:
        return str(current_platform.get_device_name())
    except (NotImplementedError, RuntimeError):
        return str(current_platform.device_type)


def _parallelism(parallel: Any) -> str:
    sizes = {
        "tp": parallel.tensor_parallel_size,
        "pp": parallel.pipeline_parallel_size,
        "ep": int(bool(getattr(parallel, "enable_expert_parallel", False))),
    }
    return " ".join(f"{name}{size}" for name, size in sizes.items())


def _attention_backend(config: Any) -> str:
    backend = getattr(getattr(config, "attention_config", None), "backend", None)
    return "auto" if backend is None else _text(getattr(backend, "name", backend))


def _graph_sizes(config: Any) -> tuple[int, ...]:
    """Token counts that passes are padded to; none where graphs are off."""
    compilation = config.compilation_config
    mode = getattr(compilation, "cudagraph_mode", None)
    if mode is None or getattr(mode, "name", "NONE") == "NONE":
        return ()
    sizes = getattr(compilation, "cudagraph_capture_sizes", None) or ()
    return tuple(sorted({int(size) for size in sizes if size > 0}))
