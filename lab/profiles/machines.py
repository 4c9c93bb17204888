"""Four machines' step times, each the sum of terms that say where they come from.

A term is *measured* (the profile timed this operator of this model on this GPU), *scaled* (timed,
but of another shape, and multiplied), *datasheet* (bytes over bandwidth). No public profile times
verification, several query tokens over a long cache, or a draft model; the terms below say what
stands in for them. Host work on today's engines runs beside the GPU and is left out where no
profile of that machine has it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from smartspec.lab.profiles import aiconfigurator, llmservingsim, vidur
from smartspec.lab.profiles.tables import Line, Surface


class Chunk(NamedTuple):
    """A part of a prompt, processed in one step."""

    num_tokens: int
    num_before: int  #: tokens of the prompt that were processed in earlier steps


class Step(NamedTuple):
    """What an engine ran in one step; all counts >= 0."""

    num_decoding: int
    num_verify_tokens: int  #: sum of k_i + 1 over the decoding requests
    context_tokens: int = 0  #: KV entries of the decoding requests
    chunks: tuple[Chunk, ...] = ()
    num_draft_forwards: int = 0
    num_draft_tokens: int = 0

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class Term(NamedTuple):
    """A summand of a step's time."""

    name: str
    source: str  #: "measured", "scaled", "datasheet" or "made up"
    note: str
    seconds: Callable[[Step], float]
    measured_to: int | None = None  #: the largest size that the source has timed; None: a formula


class Machine(NamedTuple):
    """A GPU with a model on it."""

    name: str
    terms: tuple[Term, ...]
    graph_sizes: tuple[int, ...]
    max_num_running: int
    kv_tokens: int  #: room of the KV cache
    chunk_tokens: int  #: tokens of a step, prompts' chunks filling what decoding leaves

    def seconds(self, step: Step) -> float:
        """Seconds of ``step``, without noise."""
        return sum(term.seconds(step) for term in self.terms)


#: vLLM's captured sizes by default, up to 512.
GRAPH_SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))


def _padded(num_tokens: int) -> int:
    at = bisect_left(GRAPH_SIZES, num_tokens)
    return GRAPH_SIZES[at] if at < len(GRAPH_SIZES) else num_tokens


def _dense(line: Line, note: str) -> Term:
    def seconds(step: Step) -> float:
        return line(_padded(step.num_verify_tokens + step.num_prefill_tokens))

    return Term("dense", "measured", f"{note}, at the padded size", seconds, line.last)


def _decode(surface: Surface, source: str, note: str, factor: float = 1.0) -> Term:
    def seconds(step: Step) -> float:
        if not step.num_decoding:
            return 0.0
        mean = step.context_tokens / step.num_decoding
        return factor * surface(step.num_decoding, mean)

    note = f"{note}; k + 1 query tokens are taken to read the cache once, as one does"
    return Term("decode_attention", source, note, seconds)


def _prefill(line: Line, note: str) -> Term:
    def chunk_s(chunk: Chunk) -> float:
        whole = line(chunk.num_before + chunk.num_tokens) - line(chunk.num_before)
        return max(whole, line(chunk.num_tokens)) if chunk.num_before else line(chunk.num_tokens)

    def seconds(step: Step) -> float:
        return sum(chunk_s(chunk) for chunk in step.chunks)

    note = f"{note}; a later chunk as the difference of two whole prompts"
    return Term("prefill_attention", "scaled", note, seconds)


def _logits(line: Line | Callable[[float], float], source: str, note: str) -> Term:
    def seconds(step: Step) -> float:
        return line(step.num_verify_tokens + len(step.chunks))

    return Term("lm_head", source, note, seconds, line.last if isinstance(line, Line) else None)


def _draft(bandwidth: float, weight_bytes: float, num_layers: int, flops: float) -> Term:
    # 80% of the bandwidth is what aiconfigurator's own system files reckon with; 4 us a layer are
    # what the smallest measured attention and matrix products of these profiles need together.
    forward_s = weight_bytes / (0.8 * bandwidth) + num_layers * 4 * 4e-6
    token_s = weight_bytes / (0.5 * flops)

    def seconds(step: Step) -> float:
        drafting = 1e-4 if step.num_draft_forwards else 0.0
        return drafting + step.num_draft_forwards * forward_s + step.num_draft_tokens * token_s

    note = f"weights of {weight_bytes / 1e9:g} GB over the bandwidth, {num_layers} layers"
    return Term("draft", "datasheet", note, seconds)


A100_BANDWIDTH, A100_FLOPS = 2.039e12, 312e12  #: aiconfigurator's a100_sxm.yaml
H100_BANDWIDTH, H100_FLOPS = 3.35e12, 989e12  #: its h100_sxm.yaml
RTX4090_BANDWIDTH, RTX4090_FLOPS = 1.008e12, 165e12  #: NVIDIA's datasheet, fp32 accumulation


def a100_llama2_7b(data: Path) -> Machine:
    """A100, Llama-2-7B; ``data``: folder of the profiles."""
    attention = data / "aiconfigurator/a100_sxm_vllm0.14.0_generation_attention_perf.parquet"
    context = data / "aiconfigurator/a100_sxm_vllm0.14.0_context_attention_perf.parquet"
    host = vidur.host_seconds(
        data / "vidur/a100_cpu_overheads_hist_a.csv", "meta-llama/Llama-2-7b-hf"
    )
    head_s = 4096 * 32_000 * 2 / (0.8 * A100_BANDWIDTH)
    terms = (
        _dense(vidur.dense_seconds(data / "vidur/a100_Llama-2-7b-hf_mlp.csv", 1, 32), "vidur"),
        _decode(
            aiconfigurator.decode_attention(attention, 32, 8, 32),
            "scaled",
            "vLLM 0.14 with 8 KV heads, times 4 for 32",
            4.0,
        ),
        _prefill(aiconfigurator.prefill_attention(context, 32, 32, 32), "vLLM 0.14, 32 KV heads"),
        _logits(lambda n: head_s, "datasheet", "weights over bandwidth"),
        Term("host", "measured", "vidur, early 2024", lambda step: host(max(step.num_decoding, 1))),
        _draft(A100_BANDWIDTH, 0.32e9, 12, A100_FLOPS),
    )
    return Machine("a100_7b", terms, GRAPH_SIZES, 128, 110_000, 512)


def a100_llama2_70b_tp4(data: Path) -> Machine:
    """Four A100, Llama-2-70B; ``data``: folder of the profiles."""
    attention = data / "aiconfigurator/a100_sxm_vllm0.14.0_generation_attention_perf.parquet"
    context = data / "aiconfigurator/a100_sxm_vllm0.14.0_context_attention_perf.parquet"
    host = vidur.host_seconds(
        data / "vidur/a100_cpu_overheads_hist_a.csv", "meta-llama/Llama-2-70b-hf"
    )
    head_s = 8192 * 32_000 * 2 / 4 / (0.8 * A100_BANDWIDTH)

    def all_reduce(step: Step) -> float:
        # A ring of 4 moves 2 * 3 / 4 of the data; latency and bandwidth: a100_sxm.yaml.
        num_tokens = _padded(step.num_verify_tokens + step.num_prefill_tokens)
        return 2 * 80 * (1e-5 + 1.5 * num_tokens * 8192 * 2 / 3e11)

    terms = (
        _dense(vidur.dense_seconds(data / "vidur/a100_Llama-2-70b-hf_mlp.csv", 4, 80), "vidur"),
        _decode(aiconfigurator.decode_attention(attention, 16, 2, 80), "measured", "vLLM 0.14"),
        _prefill(aiconfigurator.prefill_attention(context, 16, 2, 80), "vLLM 0.14"),
        Term("all_reduce", "datasheet", "latency, and bytes over NVLink's bandwidth", all_reduce),
        _logits(lambda n: head_s, "datasheet", "weights over bandwidth"),
        Term("host", "measured", "vidur, early 2024", lambda step: host(max(step.num_decoding, 1))),
        _draft(A100_BANDWIDTH, 2.2e9, 22, A100_FLOPS),
    )
    return Machine("a100_70b_tp4", terms, GRAPH_SIZES, 128, 400_000, 512)


def h100_llama31_8b(data: Path) -> Machine:
    """H100, Llama-3.1-8B; ``data``: folder of the profiles."""
    layers = data / "llmservingsim/h100_Llama-3.1-8B_tp1_layers.csv"
    attention = data / "aiconfigurator/h100_sxm_vllm0.24.0_generation_attention_perf.parquet"
    context = data / "aiconfigurator/h100_sxm_vllm0.24.0_context_attention_perf.parquet"
    dense = llmservingsim.whole_model(layers, 32, ("attn", "lm_head"))
    head = llmservingsim.whole_model(layers, 32, only=("lm_head",))
    terms = (
        _dense(dense, "LLMServingSim"),
        _decode(
            aiconfigurator.decode_attention(attention, 32, 8, 32),
            "measured",
            "vLLM 0.24, 256 requests to 1,024 entries each and straight on",
        ),
        _prefill(aiconfigurator.prefill_attention(context, 32, 8, 32), "vLLM 0.24"),
        _logits(head, "measured", "LLMServingSim"),
        _draft(H100_BANDWIDTH, 0.32e9, 12, H100_FLOPS),
    )
    return Machine("h100_8b", terms, GRAPH_SIZES, 256, 400_000, 1024)


def rtx4090_llama31_8b(data: Path) -> Machine:
    """RTX 4090, Llama-3.1-8B, complete; ``data``: folder of the profiles."""
    prefix = "llmservingsim/rtx4090_Llama-3.1-8B_bf16_tp1"
    decode, prefill = llmservingsim.attention(data / f"{prefix}_attention.csv", 32)
    sequences = llmservingsim.whole_model(data / f"{prefix}_per_sequence.csv", 32)

    def prefill_s(step: Step) -> float:
        return sum(prefill(chunk.num_tokens, chunk.num_before) for chunk in step.chunks)

    terms = (
        _dense(llmservingsim.whole_model(data / f"{prefix}_dense.csv", 32), "LLMServingSim"),
        _decode(decode, "measured", "LLMServingSim"),
        Term(
            "prefill_attention",
            "measured",
            "LLMServingSim; chunk by chunk, beside no decoding",
            prefill_s,
        ),
        _logits(sequences, "measured", "LLMServingSim, with the sampler"),
        _draft(RTX4090_BANDWIDTH, 0.32e9, 12, RTX4090_FLOPS),
    )
    return Machine("rtx4090_8b", terms, GRAPH_SIZES, 64, 40_000, 512)


MACHINES = (a100_llama2_7b, a100_llama2_70b_tp4, h100_llama31_8b, rtx4090_llama31_8b)
