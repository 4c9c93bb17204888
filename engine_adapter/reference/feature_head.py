"""A small head that foresees what a target will say, from what the target's layers held.

After EAGLE (Li et al. 2024; of EAGLE-3, 2025, the features of several layers). At each position
the head reads the newest token and the target's hidden states at the position *before*: of some
layers, each scaled to unit size, mixed into one *state*. One decoder layer over these makes the
next state, and the target's own output matrix, cut to the rows of frequent tokens, the logits of
the token after. Where the target has not been yet, the head's own state takes the place of these.

Nothing of the target's is stored with the head: embedding and output matrix are looked up in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from smartspec.engine_adapter.reference import attention
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.packed_linear import PackedLinear, can_pack

FORMAT = "smartspec-feature-head-1"
PROBED_VALUES = 1024  #: of each of the target's parameters, that its fingerprint looks at


class HeadNotUsable(ValueError):
    """The file is no head, or one of another target."""


@dataclass(frozen=True)
class HeadConfig:
    """The shape of a head, and whose it is."""

    target: str  #: fingerprint
    layers: tuple[int, ...]  #: after how many of the target's layers its states are read
    hidden_size: int
    num_heads: int
    num_key_heads: int
    intermediate_size: int
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class HeadOutput(NamedTuple):
    """In the shape of what Hugging Face models give."""

    logits: Tensor  #: [1, M, num_draft_tokens]
    hidden_states: tuple[Tensor]  #: ([1, M, hidden_size],), the states of the same M tokens


#: Of queries [B, num_heads, N, d] and their own keys and values: what they attend to, in q's shape.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class FeatureHead(nn.Module):
    """The head on a target.

    Parameters
    ----------
    config : its shape
    token_ids : [num_draft_tokens], tokens that it can draft, by their ids in the target
    target : whose embedding and output matrix it uses, without owning them
    """

    def __init__(self, config: HeadConfig, token_ids: Tensor, target: PreTrainedModel) -> None:
        super().__init__()
        self.config = config
        size, inner = config.hidden_size, config.intermediate_size
        width = config.num_key_heads * config.head_dim
        self.fuse = nn.Linear(len(config.layers) * size, size, bias=False)
        self.join = nn.Linear(2 * size, size, bias=False)
        self.norm_attention = nn.Parameter(torch.ones(size))
        self.query = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, width, bias=False)
        self.value = nn.Linear(size, width, bias=False)
        self.output = nn.Linear(size, size, bias=False)
        self.norm_mlp = nn.Parameter(torch.ones(size))
        self.gate = nn.Linear(size, inner, bias=False)
        self.up = nn.Linear(size, inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)
        self.norm_output = nn.Parameter(torch.ones(size))
        self.register_buffer("token_ids", token_ids)
        turns = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        self.register_buffer("_turns", turns, persistent=False)
        embedding: Any = target.get_input_embeddings()
        unembedding: Any = target.get_output_embeddings()  # type: ignore[no-untyped-call]
        rows = unembedding.weight.detach()[token_ids.to(target.device)]
        self.register_buffer("_embedding", embedding.weight.detach(), persistent=False)
        self.register_buffer("unembedding", rows, persistent=False)
        self.token_ids: Tensor
        self._turns: Tensor
        self._embedding: Tensor
        self.unembedding: Tensor
        self._packed: PackedLinear | None = None

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def state(self, features: Tensor) -> Tensor:
        """Of the target's hidden states [..., layers * hidden_size]: one state [..., hidden_size].

        Scaled layer by layer, since the first token's may be a hundred times as large as others'.
        """
        parts = features.view(*features.shape[:-1], -1, self.config.hidden_size)
        mixed: Tensor = self.fuse(_scaled(parts).flatten(-2).to(self.fuse.weight.dtype))
        return mixed

    def advance(self, states: Tensor, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The next states [B, N, hidden_size], from those before and the tokens read since, [B, N].

        ``positions`` : [B or 1, N]
        """
        read = _scaled(self._embedding[tokens]).to(states.dtype)
        mixed = self.join(torch.cat((read, _scaled(states)), -1))
        normed = _scaled(mixed) * self.norm_attention
        angles = positions[:, None, :, None] * self._turns
        cos, sin = angles.cos().to(mixed.dtype), angles.sin().to(mixed.dtype)
        seen = attend(
            _turned(self._by_head(self.query(normed)), cos, sin),
            _turned(self._by_head(self.key(normed)), cos, sin),
            self._by_head(self.value(normed)),
        )
        mixed = mixed + self.output(seen.transpose(1, 2).flatten(2))
        normed = _scaled(mixed) * self.norm_mlp
        after: Tensor = mixed + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return after

    def logits(self, states: Tensor) -> Tensor:
        """Of the token after next, [..., num_draft_tokens]."""
        read = self.normed(states).to(self.unembedding.dtype)
        if self._packed is not None:
            packed: Tensor = self._packed(read)
            return packed
        return functional.linear(read, self.unembedding)

    def pack(self) -> None:
        """Keep the output matrix in the order that suits few tokens (packed_linear.py)."""
        if self._packed is None and can_pack(self.unembedding):
            self._packed = PackedLinear(self.unembedding)

    def normed(self, states: Tensor) -> Tensor:
        """What the output matrix reads of them."""
        return _scaled(states) * self.norm_output

    def forward(
        self,
        input_ids: Tensor,
        states: Tensor,
        position_ids: Tensor,
        past_key_values: Any,
        logits_to_keep: Tensor,
        **options: Any,
    ) -> HeadOutput:
        """A ragged pass (attention.py); ``states`` [1, N, hidden_size] beside tokens [1, N]."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = past_key_values.update(key, value, 0)
            groups = {attention.KEYWORD: options[attention.KEYWORD]}
            seen, _ = attention.ragged_attention(self, query, keys, values, None, **groups)
            return seen.transpose(1, 2)

        after = self.advance(states, input_ids, position_ids, attend)[:, logits_to_keep]
        return HeadOutput(self.logits(after), (after,))

    def save(self, path: Path, notes: dict[str, str] | None = None) -> None:
        """Write the head in half precision, with ``notes`` on how it was made."""
        tensors = {
            name: value.half() if value.is_floating_point() else value.int()
            for name, value in self.state_dict().items()
        }
        told = {"format": FORMAT, "config": json.dumps(asdict(self.config)), **(notes or {})}
        save_file(tensors, path, told)

    def _by_head(self, packed: Tensor) -> Tensor:
        return packed.view(*packed.shape[:2], -1, self.config.head_dim).transpose(1, 2)


def load(path: Path, target: PreTrainedModel) -> FeatureHead:
    """The head that `FeatureHead.save` wrote, on its target's device and in its precision.

    Raises `HeadNotUsable`.
    """
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise HeadNotUsable(f"cannot read a drafter from {path}: {error}") from error
    if told.get("format") != FORMAT:
        raise HeadNotUsable(f"{path} is no drafter of format {FORMAT}")
    try:
        fields = json.loads(told["config"])
        config = HeadConfig(**{**fields, "layers": tuple(fields["layers"])})
        if config.target != fingerprint(target):
            raise HeadNotUsable(
                f"{path} was made for another model: `smartspec distill` makes one for this"
            )
        head = FeatureHead(config, tensors["token_ids"].long(), target)
        head.load_state_dict(tensors)
    except (KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
        raise HeadNotUsable(f"{path} is damaged: {error}") from error
    return head.to(target.device, target.dtype).eval()


def fingerprint(target: PreTrainedModel) -> str:
    """Tells models apart, whatever precision they are loaded in: by the signs of their weights."""
    found = hashlib.sha256()
    for parameter in target.parameters():
        signs = parameter.detach().flatten()[:PROBED_VALUES] > 0
        found.update(str(tuple(parameter.shape)).encode())
        found.update(signs.cpu().numpy().tobytes())
    return found.hexdigest()[:32]


class HeadRunner(ModelRunner):
    """Runs a head over segments of requests, as `ModelRunner` does a whole model."""

    model: Any

    def __init__(self, head: FeatureHead, num_rows: int, max_model_len: int) -> None:
        head.pack()
        unread: Any = head
        super().__init__(unread, num_rows, max_model_len)

    def _install(self) -> None:
        """The head knows ragged passes: nothing to replace."""

    def advance(
        self, segments: Sequence[Segment], states: Tensor, fresh: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits and states of the last ``num_logits`` tokens of the segments.

        ``states`` : [sum of tokens, hidden_size], before each token
        """
        output, _ = self._pass(segments, fresh, states=states)
        return output.logits[0], output.hidden_states[0][0]


def _scaled(values: Tensor) -> Tensor:
    return functional.rms_norm(values, values.shape[-1:], eps=1e-6)


def _turned(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, heads, N, d]; cos and sin [B or 1, 1, N, d / 2]."""
    first, second = values.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
