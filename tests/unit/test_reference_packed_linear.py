"""Packed layers give what plain ones give, and stand aside where they must."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_head, tiny_model
from torch import nn

from smartspec.engine_adapter.reference.feature_head import HeadRunner
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.packed_linear import PackedLinear, can_pack, pack

pytestmark = pytest.mark.skipif(not can_pack(torch.ones(1, 1)), reason="torch without oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (1, 3, 24), (70, 24)])
def test_products_are_those_of_the_plain_layer(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias))
    tokens = torch.randn(shape)
    with torch.inference_mode():
        expected = model(tokens)
        pack(model)
        assert isinstance(model[0], PackedLinear)
        torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-5)


def test_gradients_pass_through_to_the_matrix() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 4)
    tokens = torch.randn(3, 6, requires_grad=True)
    packed = PackedLinear(plain.weight, plain.bias)
    packed(tokens).sum().backward()
    assert plain.weight.grad is not None and plain.weight.grad.abs().sum() > 0
    assert tokens.grad is not None


def test_other_precisions_stay_plain() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = nn.Sequential(nn.Linear(4, 4)).to(dtype)
        pack(model)
        assert type(model[0]) is nn.Linear


def test_runner_packs_a_model_once_and_a_copy_shares_it() -> None:
    model = tiny_model("llama").float()
    names = list(model.state_dict())
    ModelRunner(model, 1, 16)
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 15  # seven in each of two layers, and the output matrix
    assert list(model.state_dict()) == names
    ModelRunner(model, 1, 16)
    again = [m for m in copy.deepcopy(model).modules() if isinstance(m, PackedLinear)]
    assert all(ours is theirs for ours, theirs in zip(layers, again, strict=True))


def test_packed_head_is_saved_as_any() -> None:
    head = tiny_head(tiny_model("llama").float()).float()
    names = list(head.state_dict())
    states = torch.randn(2, 32)
    with torch.inference_mode():
        expected = head.logits(states)
        HeadRunner(head, 1, 16)
        torch.testing.assert_close(head.logits(states), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(head.query, PackedLinear)
    assert list(head.state_dict()) == names
