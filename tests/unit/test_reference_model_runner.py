"""A ragged pass gives the logits that the model gives to each sequence by itself."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, tiny_model
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from smartspec.engine_adapter.reference.attention import MASK_ALIGNMENT, Group, ModelNotSupported
from smartspec.engine_adapter.reference.draft_tree import ROOT, lineage
from smartspec.engine_adapter.reference.model import without_layers
from smartspec.engine_adapter.reference.model_runner import (
    MAX_PADDED_TOKENS,
    ModelRunner,
    Segment,
    _without_long_tails,
)

NUM_ROWS = 10
MAX_LEN = 96


def plain_logits(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_models_own_when_rows_are_ragged(family: str) -> None:
    plain = tiny_model(family)
    runner = ModelRunner(tiny_model(family), NUM_ROWS, MAX_LEN)
    rng = np.random.default_rng(0)
    texts: dict[int, list[int]] = {row: [] for row in range(NUM_ROWS)}
    widths = (1, 2, 5, MAX_PADDED_TOKENS, MAX_PADDED_TOKENS + 1, 30)
    for _ in range(25):
        # Any rows, in any order: neighbours, gaps, short and long segments mixed.
        rows = rng.permutation(NUM_ROWS)[: rng.integers(1, NUM_ROWS + 1)].tolist()
        segments = []
        for row in rows:
            size = int(rng.choice(widths))
            if len(texts[row]) + size > MAX_LEN or rng.random() < 0.1:
                texts[row] = []  # another request takes the row over, leftovers and all
            size = min(size, MAX_LEN)
            tokens = rng.integers(0, VOCABULARY, size).tolist()
            wanted = int(rng.integers(0, size + 1))
            segments.append(Segment(row, len(texts[row]), tokens, wanted))
            texts[row] = texts[row] + tokens
        logits = runner.forward(segments)
        expected = [
            plain_logits(plain, texts[s.row])[-s.num_logits :] for s in segments if s.num_logits
        ]
        assert len(logits) == sum(segment.num_logits for segment in segments)
        if expected:
            torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_logits_are_right_when_rejected_tokens_are_overwritten() -> None:
    plain, runner = tiny_model("llama"), ModelRunner(tiny_model("llama"), 2, MAX_LEN)
    prompt = list(range(20))
    runner.forward([Segment(0, 0, prompt, 0)])
    runner.forward([Segment(0, 20, [1, 2, 3, 4], 4)])  # 1 is right, 2, 3 and 4 are not
    logits = runner.forward([Segment(0, 21, [9, 8], 2)])
    torch.testing.assert_close(
        logits, plain_logits(plain, [*prompt, 1, 9, 8])[-2:], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_when_a_few_segments_are_much_longer(family: str) -> None:
    plain, runner = tiny_model(family), ModelRunner(tiny_model(family), 6, MAX_LEN)
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, VOCABULARY, 4 + row).tolist() for row in range(6)]
    runner.forward([Segment(row, 0, text[:3], 0) for row, text in enumerate(texts)])
    sizes = [1, 12, 1, 2, 1, 9]
    segments = []
    for row, (text, size) in enumerate(zip(texts, sizes, strict=True)):
        text[3:] = rng.integers(0, VOCABULARY, size).tolist()
        segments.append(Segment(row, 3, text[3:], min(size, 8)))
    cut = _without_long_tails(segments)
    assert [s.row for s in cut if s.is_tail] == [1, 5]
    assert sum(s.num_logits for s in cut) == sum(s.num_logits for s in segments)
    expected = [
        plain_logits(plain, text)[-s.num_logits :] for text, s in zip(texts, segments, strict=True)
    ]
    torch.testing.assert_close(runner.forward(segments), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_segments_stay_whole_when_cutting_saves_nothing_or_they_branch() -> None:
    even = [Segment(row, 5, [1, 2, 3], 3) for row in range(4)]
    prompt = Segment(4, 0, [1] * (MAX_PADDED_TOKENS + 9), 1)
    assert _without_long_tails([*even, prompt]) == [*even, prompt]
    bush = Segment(5, 5, [1] * 12, 12, [ROOT, *[0] * 11])
    single = [Segment(row, 5, [1], 1) for row in range(4)]
    assert _without_long_tails([*single, bush]) == [*single, bush]


def test_logits_are_right_when_a_row_has_moved() -> None:
    plain, runner = tiny_model("gpt2"), ModelRunner(tiny_model("gpt2"), 4, MAX_LEN)
    prompt = list(range(30))
    runner.forward([Segment(3, 0, prompt, 0)])
    runner.cache.move(3, 1, len(prompt))
    logits = runner.forward([Segment(1, 30, [5], 1)])
    torch.testing.assert_close(logits, plain_logits(plain, [*prompt, 5])[-1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_node_are_those_of_its_path_when_rows_end_in_trees(family: str) -> None:
    plain = tiny_model(family)
    runner = ModelRunner(tiny_model(family), NUM_ROWS, MAX_LEN)
    rng = np.random.default_rng(1)
    texts: dict[int, list[int]] = {row: [] for row in range(NUM_ROWS)}
    num_branching = 0
    for _ in range(25):
        rows = rng.permutation(NUM_ROWS)[: rng.integers(1, NUM_ROWS + 1)].tolist()
        segments, paths = [], []
        for row in rows:
            size = int(rng.integers(1, MAX_PADDED_TOKENS + 8))
            if len(texts[row]) + size > MAX_LEN:
                texts[row] = []
            tokens = rng.integers(0, VOCABULARY, size).tolist()
            # Anything from a chain to a bush, and rows that know of no tree.
            reach = int(rng.integers(1, 4))
            parents = [max(ROOT, node - int(rng.integers(1, reach + 1))) for node in range(size)]
            if rng.random() < 0.2:
                parents = list(range(-1, size - 1))
            known = () if parents == list(range(-1, size - 1)) and rng.random() < 0.5 else parents
            segment = Segment(row, len(texts[row]), tokens, size, known)
            num_branching += segment.branches
            segments.append(segment)
            paths.append(lineage(parents))
        logits = runner.forward(segments).split([len(s.tokens) for s in segments])
        kept = []
        for segment, found, path in zip(segments, logits, paths, strict=True):
            text = texts[segment.row]
            tokens = np.array(segment.tokens)
            for node in rng.permutation(len(tokens))[:4]:
                expected = plain_logits(plain, text + tokens[path[node]].tolist())[-1]
                torch.testing.assert_close(found[node], expected, rtol=1e-5, atol=1e-5)
            accepted = np.flatnonzero(path[rng.integers(len(tokens))]).tolist()
            kept.append((segment.row, len(text), accepted))
            texts[segment.row] = text + tokens[accepted].tolist()
        runner.cache.compact(kept)
    assert num_branching > 50


def test_logits_are_right_when_a_tree_grows_over_several_passes() -> None:
    plain, runner = tiny_model("llama"), ModelRunner(tiny_model("llama"), 2, MAX_LEN)
    prompt = list(range(20))
    runner.forward([Segment(1, 0, prompt, 0)])
    tokens, parents = [5, 6, 7, 8, 9], [ROOT, ROOT, 1, 0, 1]
    first = runner.forward([Segment(1, 20, tokens[:2], 2, parents[:2])])
    second = runner.forward([Segment(1, 22, tokens[2:], 3, parents)])
    for found, path in zip(
        (*first, *second), ([5], [6], [6, 7], [5, 8], [6, 9]), strict=True
    ):  # fmt: skip
        expected = plain_logits(plain, prompt + path)[-1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_context", [1, 16, 37])
def test_rows_of_a_mask_are_aligned_when_the_context_is_not(num_context: int) -> None:
    slots = torch.tensor([[num_context - 1, 0]])
    mask = Group(0, 1, num_context, slots, None, None).mask(3, torch.float32)
    assert mask.shape == (1, 1, 6, num_context) and mask.stride(-1) == 1
    assert all(step % MASK_ALIGNMENT == 0 for step in mask.stride()[:-1])
    seen = (mask[0, 0] == 0).sum(1)
    assert seen.tolist() == [num_context, 1] * 3


def test_tokens_on_the_device_take_the_place_of_the_segments_own() -> None:
    runner = ModelRunner(tiny_model("qwen2"), 4, MAX_LEN)
    rows = [2, 0, 3]
    fresh = torch.tensor([11, 12, 13])
    found = runner.forward([Segment(row, 0, [0], 1) for row in rows], fresh)
    expected = runner.forward([Segment(row, 0, [11 + i], 1) for i, row in enumerate(rows)])
    torch.testing.assert_close(found, expected)


def test_two_runners_can_share_one_model() -> None:
    model = tiny_model("llama")
    first, second = ModelRunner(model, 2, MAX_LEN), ModelRunner(model, 2, MAX_LEN)
    segment = Segment(0, 0, [1, 2, 3], 3)
    torch.testing.assert_close(first.forward([segment]), second.forward([segment]))


def test_layers_left_out_share_the_others_weights() -> None:
    model = tiny_model("llama", num_layers=4)
    thin = without_layers(model, [1, 2])
    assert thin.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 4
    assert thin.model.layers[1].mlp.up_proj.weight is model.model.layers[3].mlp.up_proj.weight
    by_hand = copy.deepcopy(model)
    by_hand.model.layers = nn.ModuleList([by_hand.model.layers[0], by_hand.model.layers[3]])
    by_hand.config.num_hidden_layers = 2
    tokens = [3, 1, 4, 1, 5]
    torch.testing.assert_close(plain_logits(thin, tokens), plain_logits(by_hand, tokens))
    logits = ModelRunner(thin, 1, 16).forward([Segment(0, 0, tokens, 5)])
    torch.testing.assert_close(logits, plain_logits(by_hand, tokens), rtol=1e-5, atol=1e-5)


def test_layers_are_refused_when_they_do_not_exist() -> None:
    with pytest.raises(ValueError, match="layers \\[2\\] do not exist"):
        without_layers(tiny_model("llama"), [0, 2])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        # Position biases are added to the scores outside the interface.
        (lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=48)),
         "attention interface"),
        # Scores are squashed.
        (lambda: Gemma2ForCausalLM(Gemma2Config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, vocab_size=48, pad_token_id=None)),
         "softcap"),
    ],
    ids=["bloom", "gemma2"],
)  # fmt: skip
def test_model_is_refused_when_its_attention_cannot_be_run(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelNotSupported, match=message):
        ModelRunner(build().eval(), 2, 32)


def test_cache_is_refused_when_longer_than_the_sliding_window() -> None:
    config = MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=48, sliding_window=40,
    )  # fmt: skip
    with pytest.raises(ModelNotSupported, match="sliding window"):
        ModelRunner(MistralForCausalLM(config).eval(), 2, 64)
    ModelRunner(MistralForCausalLM(config).eval(), 2, 40)


def test_cache_is_refused_when_longer_than_the_model() -> None:
    with pytest.raises(ValueError, match="max_model_len is 300, but the model ends at 256"):
        ModelRunner(tiny_model("gpt2"), 2, 300)
