"""Keys and values of the running requests: a row each, written in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class KvCache(Cache):
    """One row of ``max_model_len`` slots per running request, in every layer.

    A token's slot is its position in the request, but for drafts of a tree: those of one depth have
    one position and a slot each, until `compact` puts the accepted ones where they belong.

    The rows in use are kept together at the front (see `Scheduler.admit`), so that attention reads
    them through a view, without gathering. Slots after a row's last token hold leftovers of
    rejected drafts and earlier requests: masks hide them, later tokens overwrite them.

    Layers are allocated when they are first written, with the shapes that the model produces.

    Parameters
    ----------
    num_rows : requests that can run at once
    max_model_len : tokens that a request can have
    """

    def __init__(self, num_rows: int, max_model_len: int) -> None:
        super().__init__(layers=[])
        self.num_rows = num_rows
        self.max_model_len = max_model_len
        # By layer: [num_rows, num_heads, max_model_len, head_dim].
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._rows: Tensor | None = None
        self._slots: Tensor | None = None
        self._index: dict[int, Tensor] = {}

    @property
    def num_layers(self) -> int:
        return len(self._keys)

    def write_at(self, rows: Tensor, slots: Tensor) -> None:
        """Where the tokens of the next pass belong: ``rows`` and ``slots``, [N] each."""
        self._rows, self._slots = rows, slots
        self._index.clear()

    def update(  # type: ignore[no-untyped-def]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write [1, num_heads, N, head_dim] keys and values; return the layer's whole cache."""
        if layer_idx not in self._keys:
            self._keys[layer_idx] = self._allocate(key_states)
            self._values[layer_idx] = self._allocate(value_states)
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        index = self._flat_index(keys.shape[1])
        keys.view(-1, keys.shape[3]).index_copy_(0, index, key_states[0].flatten(0, 1))
        values.view(-1, values.shape[3]).index_copy_(0, index, value_states[0].flatten(0, 1))
        return keys, values

    @torch.inference_mode()
    def move(self, source: int | slice, target: int | Tensor, num_tokens: int) -> None:
        """Copy the first ``num_tokens`` slots of one row to another, or of many to as many."""
        for layer in (*self._keys.values(), *self._values.values()):
            layer[target, :, :num_tokens] = layer[source, :, :num_tokens]

    @torch.inference_mode()
    def compact(self, kept: Iterable[tuple[int, int, Sequence[int]]]) -> None:
        """Close the gaps that rejected drafts leave between accepted ones.

        ``kept`` : (row, slot of the first draft, drafts to keep, counted from that slot and
        rising); the i-th of them moves to the i-th slot. Chains have nothing to move.
        """
        moves = [
            (row, first + draft, first + place)
            for row, first, drafts in kept
            for place, draft in enumerate(drafts)
            if draft != place
        ]
        if not moves:
            return
        index = torch.tensor(moves, device=self._keys[0].device)
        rows, sources, targets = index.unbind(1)
        for layer in (*self._keys.values(), *self._values.values()):
            layer[rows, :, targets] = layer[rows, :, sources]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # rows have lengths of their own; positions are always given

    def _allocate(self, states: Tensor) -> Tensor:
        # Zeros and not empty: a masked weight of 0 times NaN would be NaN.
        return torch.zeros(
            (self.num_rows, states.shape[1], self.max_model_len, states.shape[3]),
            dtype=states.dtype,
            device=states.device,
        )

    def _flat_index(self, num_heads: int) -> Tensor:
        """Index [num_heads * N] of the written slots in a layer flattened to [-1, head_dim]."""
        if num_heads not in self._index:
            if self._rows is None or self._slots is None:
                raise RuntimeError("write_at() must be called before every pass")
            heads = torch.arange(num_heads, device=self._rows.device)[:, None]
            index = (self._rows * num_heads + heads) * self.max_model_len + self._slots
            self._index[num_heads] = index.flatten()
        return self._index[num_heads]
