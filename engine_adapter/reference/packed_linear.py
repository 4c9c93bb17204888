"""Linear layers whose matrices are laid out for few tokens: on a CPU, in single precision.

A step's pass has a handful of tokens: one or a few per request. Torch's product of so few with a
matrix as it stands is far below the memory's pace, and slower for two than for five; oneDNN, which
comes with torch, keeps matrices in an order of its own. Results differ by rounding alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FEW_TOKENS = 4  #: of a pass that the order is chosen for


class PackedLinear(nn.Module):
    """A linear layer that keeps its matrix twice, as it was and packed: neither may change."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        ops: Any = torch.ops.mkldnn
        self._packed = ops._reorder_linear_weight(weight.detach(), FEW_TOKENS)
        self._product = ops._linear_pointwise

    def forward(self, tokens: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return functional.linear(tokens, self.weight, self.bias)
        product: Tensor = self._product(tokens, self._packed, self.bias, "none", [], "")
        return product

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        return self  # a thinned model shares its weights (see `model.without_layers`)


def can_pack(weight: Tensor) -> bool:
    """Whether it is worth while: elsewhere products of few tokens are at the memory's pace."""
    there = weight.device.type == "cpu" and weight.dtype == torch.float32
    return there and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def pack(model: nn.Module) -> None:
    """Pack the linear layers of a model, in place, where `can_pack`."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(parent, name, PackedLinear(child.weight, child.bias))
