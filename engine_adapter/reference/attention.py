"""Attention over a packed, ragged batch, put under an unmodified Hugging Face model.

All tokens of a pass are one sequence of length N to the model; which request a token belongs to
only matters in attention. There the tokens are split into *groups*. A group is a range of cache
rows, with up to Q query tokens per row: the decoding requests, padded to the longest of them, or
one chunk of a prompt. Keys and values are read through a view of the cache. Query heads that share
a key head are folded into the query axis, so that nothing is repeated in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

NAME = "smartspec_ragged"
KEYWORD = "ragged_groups"  #: how a pass's groups travel through the model's keyword arguments
#: Rows of a mask begin at multiples of so many elements: CUDA's attention with a mask reads no
#: others, and torch would copy the mask to such in every layer.
MASK_ALIGNMENT = 16

_IGNORED = {
    "position_ids",
    "use_cache",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "cache_position",
}


class ModelNotSupported(ValueError):
    """The model's attention cannot be run on a ragged batch."""


@dataclass(frozen=True, slots=True)
class Trees:
    """Rows that end in a tree: a query sees what comes before the tree, and its own ancestors.

    Parameters
    ----------
    begin : [num_rows], slot of each tree's first node
    lineage : [num_rows, Q, W] bool, whether a query is, or descends from, each of W nodes; of
        padding the first alone is True
    """

    begin: Tensor
    lineage: Tensor

    def hidden(self, places: Tensor) -> Tensor:
        """Where queries may not look, [num_rows, Q, C], of the slots ``places`` [C]."""
        num_rows, num_queries, width = self.lineage.shape
        node = (places - self.begin[:, None])[:, None]  # [num_rows, 1, C]; below 0: before the tree
        index = node.clamp(0, width - 1).expand(num_rows, num_queries, -1)
        related = self.lineage.gather(2, index) & (node < width)
        return ~(related | (node < 0))


@dataclass(slots=True)
class Group:
    """Query tokens of a range of cache rows, read up to the longest context among them.

    Parameters
    ----------
    first_row, num_rows : range of cache rows
    num_context : slots read of every row
    slots : [num_rows, Q], of the queries in their rows; 0 for padding
    gather : [num_rows * Q], packed index of each query, 0 for padding; None: all N, in order
    scatter : [tokens of the group], index into the num_rows * Q queries; None: no padding
    trees : which slots a query sees; None: its own and all before it
    """

    first_row: int
    num_rows: int
    num_context: int
    slots: Tensor
    gather: Tensor | None
    scatter: Tensor | None
    trees: Trees | None = None
    _masks: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, num_folded: int, dtype: torch.dtype) -> Tensor:
        """0 where a query may look, -inf elsewhere: [num_rows, 1, num_folded * Q, num_context].

        Built once per pass and shared by the layers. Padding looks somewhere too, so that its
        softmax is finite.
        """
        key = (num_folded, dtype)
        if key not in self._masks:
            aligned = -(-self.num_context // MASK_ALIGNMENT) * MASK_ALIGNMENT
            places = torch.arange(aligned, device=self.slots.device)
            if self.trees is None:
                hidden = places > self.slots[:, :, None]
            else:
                hidden = self.trees.hidden(places)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            bias.masked_fill_(hidden, -torch.inf)
            mask = bias.repeat(1, num_folded, 1)[:, None]
            self._masks[key] = mask[..., : self.num_context]
        return self._masks[key]


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for `transformers.AttentionInterface`.

    Parameters
    ----------
    query : [1, num_heads, N, head_dim], packed
    key, value : [num_cache_rows, num_key_heads, max_model_len, head_dim], from `KvCache.update`

    Returns [1, N, num_heads, head_dim].
    """
    groups: list[Group] | None = kwargs.pop(KEYWORD, None)
    if groups is None:
        raise ModelNotSupported(f"{type(module).__name__} does not hand on keyword arguments")
    window = kwargs.pop("sliding_window", None)
    if window is not None and window < key.shape[2]:
        raise ModelNotSupported(
            f"the model's sliding window ({window} tokens) must not be below max_model_len "
            f"({key.shape[2]})"
        )
    if extra := [k for k, v in kwargs.items() if k not in _IGNORED and v is not None]:
        raise ModelNotSupported(f"attention with {', '.join(sorted(extra))} is not supported")

    packed = query[0]
    num_heads = packed.shape[0]
    num_key_heads = key.shape[1]
    folded = num_heads // num_key_heads
    outputs = []
    for group in groups:
        rows = slice(group.first_row, group.first_row + group.num_rows)
        q = packed if group.gather is None else packed.index_select(1, group.gather)
        width = q.shape[1] // group.num_rows
        q = q.reshape(num_key_heads, folded, group.num_rows, width, -1)
        q = q.permute(2, 0, 1, 3, 4).reshape(group.num_rows, num_key_heads, folded * width, -1)
        out = functional.scaled_dot_product_attention(
            q,
            key[rows, :, : group.num_context],
            value[rows, :, : group.num_context],
            attn_mask=group.mask(folded, q.dtype),
            scale=scaling,
        )
        out = out.reshape(group.num_rows, num_heads, width, -1).transpose(1, 2).flatten(0, 1)
        outputs.append(out if group.scatter is None else out.index_select(0, group.scatter))
    result = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return result.unsqueeze(0), None


# No mask function is registered under this name: models then build no mask of their own.
AttentionInterface.register(NAME, ragged_attention)
