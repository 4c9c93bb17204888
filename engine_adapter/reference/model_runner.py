"""One ragged forward pass: tokens of many requests, packed into a single sequence.

Used for the target model and for a draft model alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartspec.engine_adapter.reference import attention
from smartspec.engine_adapter.reference.attention import Group, ModelNotSupported, Trees
from smartspec.engine_adapter.reference.draft_tree import lineage
from smartspec.engine_adapter.reference.kv_cache import KvCache
from smartspec.engine_adapter.reference.packed_linear import pack

#: Segments up to this long share a padded group; longer ones (prompt chunks) are a group each.
MAX_PADDED_TOKENS = 16
#: Another group costs about as much as attention of so many padded tokens.
GROUP_TOKENS = 8
#: Unused rows that a group may span. Reading one costs about as much as starting another group.
MAX_ROW_GAP = 1
#: Rotary embeddings that change with the longest position *of the batch*: not row by row.
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class Segment(NamedTuple):
    """Tokens of one request, in slots one after the other; consecutive but for those of a tree."""

    row: int  #: of the KV cache
    start: int  #: slot of the first token
    tokens: list[int]
    num_logits: int  #: logits are wanted of this many last tokens
    #: of the tree whose last nodes these tokens are: parents of all its nodes, in slot order;
    #: `ROOT`: what comes before the tree. Empty: the tokens follow each other
    parents: Sequence[int] = ()
    is_tail: bool = False  #: the beginning of the row's tokens is a segment of its own

    @property
    def tree_start(self) -> int:
        """Slot of the tree's first node: earlier passes may have run some of them."""
        return self.start + len(self.tokens) - len(self.parents)

    @property
    def branches(self) -> bool:
        """Whether there is a token that does not follow the one in the slot before."""
        return any(parent != node - 1 for node, parent in enumerate(self.parents))


class ModelRunner:
    """Runs a causal language model over segments of requests, each with its own cache row.

    Raises `ModelNotSupported` when the model's logits differ from those that it gives by itself
    on a short probe: an attention feature that does not go through the interface, for example.

    Parameters
    ----------
    model : a Hugging Face causal language model; its attention implementation is replaced
    num_rows, max_model_len : size of the KV cache
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, max_model_len: int) -> None:
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and max_model_len > limit:
            raise ValueError(f"max_model_len is {max_model_len}, but the model ends at {limit}")
        rope = getattr(model.config, "rope_parameters", None) or {}
        if rope.get("rope_type") in BATCH_DEPENDENT_ROPE:
            raise ModelNotSupported(f"rope_type {rope['rope_type']!r} depends on the whole batch")
        self.model = model
        self.model.train(False)
        pack(self.model)
        self.device = model.device
        if self.device.type == "cuda":
            # cuDNN's attention is planned anew for every shape, and contexts grow with every step.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.cache = KvCache(num_rows, max_model_len)
        self._install()

    def forward(self, segments: Sequence[Segment], fresh: Tensor | None = None) -> Tensor:
        """Logits [sum of num_logits, vocabulary] of one pass, in the order of the segments.

        Parameters
        ----------
        segments : one per row at most, of one token at least; long ones are cut in two here
        fresh : [len(segments)], tokens that are on the device already and take the place of the
            segments' own, which must be one each (their values are ignored)
        """
        logits: Tensor = self._pass(segments, fresh)[0].logits[0]
        return logits

    def forward_with_features(
        self, segments: Sequence[Segment], layers: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Logits as of `forward`, and hidden states of all tokens, in the segments' order.

        ``layers`` : after how many layers, side by side; all of them: after the last norm too.
        The states are [sum of tokens, len(layers) * hidden_size].
        """
        output, places = self._pass(segments, output_hidden_states=True)
        states = torch.cat([output.hidden_states[layer][0] for layer in layers], -1)
        return output.logits[0], states[places]

    @torch.inference_mode()
    def forward_rows(
        self, first_row: int, tokens: Tensor, slots: Tensor, keep: Tensor, num_context: int
    ) -> Tensor:
        """Logits [len(keep), vocabulary] of a pass over as many tokens in each of many rows.

        All of it is on the device already, and no row is looked at by itself.

        Parameters
        ----------
        first_row : of those, one after the other, that the tokens belong to
        tokens, slots : [rows, Q]; what comes after a row's last token may be anything
        keep : of which tokens, counted row by row, logits are wanted
        num_context : slots read of every row, at least as many as any has
        """
        rows = torch.arange(first_row, first_row + len(tokens), device=self.device)
        self.cache.write_at(rows.repeat_interleave(tokens.shape[1]), slots.flatten())
        group = Group(first_row, len(tokens), num_context, slots, gather=None, scatter=None)
        output = self.model(
            input_ids=tokens.reshape(1, -1),
            position_ids=slots.reshape(1, -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
            **{attention.KEYWORD: [group]},
        )
        logits: Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def _pass(
        self,
        segments: Sequence[Segment],
        fresh: Tensor | None = None,
        states: Tensor | None = None,
        **options: Any,
    ) -> tuple[Any, Tensor]:
        """The model's output, and where in the packed sequence each token of the segments is.

        ``states`` : [sum of tokens, ...], what the model reads besides each token
        """
        if fresh is None:
            segments = _without_long_tails(segments)
        trees = {i: lineage(s.parents) for i, s in enumerate(segments) if s.branches}
        order, groups = self._layout(segments, trees)
        sizes = np.array([len(segments[i].tokens) for i in order])
        starts = np.array([segments[i].start for i in order])
        ends = np.cumsum(sizes)
        within = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        last = np.empty(len(segments), np.int64)
        last[order] = ends
        index = np.empty((4, ends[-1]), np.int64)
        index[0] = np.repeat([segments[i].row for i in order], sizes)
        index[1] = np.repeat(starts, sizes) + within
        index[2] = index[1]
        for i, related in trees.items():  # the position of a tree's node is its depth
            size = len(segments[i].tokens)
            depths = related[-size:].sum(1) - 1
            index[2, last[i] - size : last[i]] = segments[i].tree_start + depths
        if fresh is None:
            index[3] = list(itertools.chain.from_iterable(segments[i].tokens for i in order))
        else:
            index[3] = order
        rows, slots, positions, tokens = self._to_device(index)
        if fresh is not None:
            tokens = fresh[tokens]
        wanted = [
            np.arange(end - segment.num_logits, end)
            for segment, end in zip(segments, last.tolist(), strict=True)
            if segment.num_logits
        ]
        keep = self._to_device(np.concatenate(wanted) if wanted else np.empty(0, np.int64))
        places = self._to_device(
            np.concatenate(
                [
                    np.arange(end - len(segment.tokens), end)
                    for segment, end in zip(segments, last.tolist(), strict=True)
                ]
            )
        )
        if states is not None:
            packed = torch.empty_like(states)
            packed[places] = states
            options["states"] = packed[None]
        self.cache.write_at(rows, slots)
        output = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
            **{attention.KEYWORD: groups},
            **options,
        )
        return output, places

    def _layout(
        self, segments: Sequence[Segment], trees: dict[int, npt.NDArray[np.bool_]]
    ) -> tuple[list[int], list[Group]]:
        """The order of the segments in the packed sequence, and the groups that read it."""
        order: list[int] = []
        groups: list[Group] = []
        offset = 0
        runs = list(self._runs(segments))
        for run in runs:
            members = [segments[i] for i in run]
            first_row = members[0].row
            num_rows = members[-1].row - first_row + 1
            sizes = [len(segment.tokens) for segment in members]
            width = max(sizes)
            padded = num_rows * width != sum(sizes)
            slots = np.zeros((num_rows, width), np.int64)
            gather = np.zeros((num_rows, width), np.int64)
            taken = np.zeros((num_rows, width), bool)
            for segment, size in zip(members, sizes, strict=True):
                row = segment.row - first_row
                slots[row, :size] = range(segment.start, segment.start + size)
                gather[row, :size] = range(offset, offset + size)
                taken[row, :size] = True
                offset += size
            groups.append(
                Group(
                    first_row=first_row,
                    num_rows=num_rows,
                    num_context=int(slots.max()) + 1,
                    slots=self._to_device(slots),
                    gather=self._to_device(gather.ravel()) if padded or len(runs) > 1 else None,
                    scatter=self._to_device(np.flatnonzero(taken)) if padded else None,
                    trees=self._trees(segments, run, trees, (num_rows, width)),
                )
            )
            order += run
        return order, groups

    def _trees(
        self,
        segments: Sequence[Segment],
        run: list[int],
        trees: dict[int, npt.NDArray[np.bool_]],
        shape: tuple[int, int],
    ) -> Trees | None:
        """The trees of a group of ``shape`` [num_rows, Q], where it has any."""
        if not trees.keys() & set(run):
            return None
        # To this mask, tokens that follow each other are a tree that does not branch.
        related = {
            i: trees[i] if i in trees else np.tri(len(segments[i].tokens), dtype=np.bool_)
            for i in run
        }
        begin = np.zeros(shape[0], np.int64)
        sees = np.zeros((*shape, max(map(len, related.values()))), np.bool_)
        sees[:, :, 0] = True
        for i, lines in related.items():
            row, size = segments[i].row - segments[run[0]].row, len(segments[i].tokens)
            begin[row] = segments[i].start + size - len(lines)
            sees[row, :size] = False
            sees[row, :size, : len(lines)] = lines[-size:]
        return Trees(self._to_device(begin), self._to_device(sees))

    @staticmethod
    def _runs(segments: Sequence[Segment]) -> Iterator[list[int]]:
        """Segments by group: runs of neighbouring rows, then what is long, and tails, alone."""
        by_row = sorted(range(len(segments)), key=lambda i: segments[i].row)
        alone = {i for i in by_row if segments[i].is_tail or not _is_short(segments[i])}
        run: list[int] = []
        for i in by_row:
            if i in alone:
                continue
            if run and segments[i].row - segments[run[-1]].row > MAX_ROW_GAP + 1:
                yield run
                run = []
            run.append(i)
        if run:
            yield run
        for i in by_row:
            if i in alone:
                yield [i]

    def _to_device(self, array: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    @torch.inference_mode()
    def _install(self) -> None:
        """Replace the model's attention, and compare its logits with those it gave before."""
        name = type(self.model).__name__
        if not self.model._can_set_attn_implementation():
            raise ModelNotSupported(f"{name} does not use transformers' attention interface")
        size = min(24, self.cache.max_model_len)
        vocabulary = self.model.config.get_text_config().vocab_size
        tokens = [(7 * i + 3) % vocabulary for i in range(size)]
        ids = torch.tensor([tokens], device=self.device)
        if self.model.config._attn_implementation == attention.NAME:  # a second runner's model
            self.model.set_attn_implementation("eager")
        expected = self.model(input_ids=ids, use_cache=False).logits[0].float()
        self.model.set_attn_implementation(attention.NAME)
        half = size // 2
        row = self.cache.num_rows - 1
        try:
            parts = [
                self.forward([Segment(row, begin, tokens[begin:end], end - begin)])
                for begin, end in ((0, half), (half, size))
                if end > begin
            ]
        except TypeError as refusal:
            raise ModelNotSupported(f"{name} cannot run a ragged pass: {refusal}") from refusal
        layers = self.model.config.get_text_config().num_hidden_layers
        if self.cache.num_layers != layers:
            raise ModelNotSupported(
                f"{name} keeps {self.cache.num_layers} of {layers} layers in the KV cache"
            )
        found = torch.cat(parts).float()
        # Rounding adds up over layers: of random weights to 0.005 times the root of their number.
        is_half_precision = self.model.dtype in (torch.bfloat16, torch.float16)
        tolerance = max(0.05, 0.02 * layers**0.5) if is_half_precision else 1e-3
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= tolerance:
            raise ModelNotSupported(
                f"{name} gives other logits on a ragged batch (relative error {error:.2g})"
            )


def _is_short(segment: Segment) -> bool:
    return len(segment.tokens) <= MAX_PADDED_TOKENS


def _without_long_tails(segments: Sequence[Segment]) -> list[Segment]:
    """Segments cut where that saves padding: a group is as wide as the longest of its segments.

    The width at which attention has the least to do, with a group for every tail beyond it, as if
    all short segments were one group. What has branches stays whole.
    """
    sizes = [len(segment.tokens) for segment in segments if _is_short(segment)]

    def work(width: int) -> int:
        beyond = [size - width for size in sizes if size > width]
        return width * len(sizes) + sum(beyond) + GROUP_TOKENS * len(beyond)

    best = min(range(1, MAX_PADDED_TOKENS + 1), key=lambda width: (work(width), width))
    cut: list[Segment] = []
    for segment in segments:
        size = len(segment.tokens)
        if size <= best or not _is_short(segment) or segment.branches:
            cut.append(segment)
            continue
        tail = min(segment.num_logits, size - best)
        cut += [
            Segment(segment.row, segment.start, segment.tokens[:best], segment.num_logits - tail),
            Segment(segment.row, segment.start + best, segment.tokens[best:], tail, is_tail=True),
        ]
    return cut
