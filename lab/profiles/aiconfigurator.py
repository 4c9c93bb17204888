"""Readers of aiconfigurator's profiles (github.com/ai-dynamo/aiconfigurator, Apache-2.0).

They are in Parquet, and need pyarrow, which the `dev` extra brings.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smartspec.lab.profiles.tables import Line, Surface


def _rows(path: Path, num_heads: int, num_kv_heads: int) -> Iterator[dict[str, Any]]:
    """Rows of one attention shape: bfloat16, heads of 128, no window, not FlashAttention 4."""
    from pyarrow import parquet

    wanted = {
        "num_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": 128,
        "kv_cache_dtype": "bfloat16",
        "attn_dtype": "bfloat16",
    }
    found = False
    for row in parquet.read_table(path).to_pylist():
        plain = all(row[name] == value for name, value in wanted.items())
        if plain and not row.get("window_size") and not row["kernel_source"].endswith("fa4"):
            found = True
            yield row
    if not found:
        raise ValueError(f"{path.name}: no rows with {num_heads} and {num_kv_heads} heads")


def decode_attention(path: Path, num_heads: int, num_kv_heads: int, num_layers: int) -> Surface:
    """Seconds of all layers by (requests, context of each), one query token each."""
    return Surface(
        (row["batch_size"], row["isl"] + row["step"], num_layers * 1e-3 * row["latency"])
        for row in _rows(path, num_heads, num_kv_heads)
    )


def prefill_attention(path: Path, num_heads: int, num_kv_heads: int, num_layers: int) -> Line:
    """Seconds of all layers by tokens of one whole prompt."""
    return Line(
        {
            row["isl"]: num_layers * 1e-3 * row["latency"]
            for row in _rows(path, num_heads, num_kv_heads)
            if row["batch_size"] == 1
        }
    )
