"""Small random models and a small tokenizer, for tests of the reference worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from smartspec.engine_adapter.base import DecodeBatch, StepFacts
from smartspec.engine_adapter.lengths import Choice
from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree
from smartspec.engine_adapter.reference.events import Finished
from smartspec.engine_adapter.reference.feature_head import FeatureHead, HeadConfig, fingerprint
from smartspec.engine_adapter.reference.proposer import Availability, Proposal
from smartspec.engine_adapter.reference.sequence import Sequence
from smartspec.engine_adapter.reference.worker import Worker

FAMILIES = ("llama", "qwen2", "gpt2")
VOCABULARY = 48
MAX_POSITIONS = 256


def tiny_model(family: str, seed: int = 0, num_layers: int = 2) -> PreTrainedModel:
    """A model with random weights in fp64: rounding cannot decide which token is likeliest."""
    torch.manual_seed(seed)
    shared = {
        "vocab_size": VOCABULARY,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.3,
    }
    if family == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(
            GPT2Config(n_positions=MAX_POSITIONS, n_embd=32, n_layer=num_layers, n_head=4, **shared)
        )
    else:
        config, kind = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        }[family]
        model = kind(
            config(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=num_layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=MAX_POSITIONS,
                **shared,
            )
        )
    return model.to(torch.float64).eval()


def tiny_head(target: PreTrainedModel) -> FeatureHead:
    """An untrained head: it drafts three quarters of the tokens."""
    torch.manual_seed(0)
    config = HeadConfig(
        target=fingerprint(target),
        layers=(1, 2),
        hidden_size=32,
        num_heads=4,
        num_key_heads=2,
        intermediate_size=24,
    )
    head = FeatureHead(config, torch.arange(0, VOCABULARY * 3 // 4), target)
    return head.to(torch.float64).eval()


class LetterTokenizer:
    """Token i is the i-th of some short strings, among them single bytes of a wider character."""

    pieces = (*"abcdefghijklmnopqrstuvwxyz", " ", ".", "ab", "cde", "the", "stop", "!", "\n")

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        raw = b"".join(self._bytes(i) for i in ids)
        return raw.decode("utf-8", errors="replace")

    def convert_ids_to_tokens(self, ids: int) -> str:
        return "".join(chr(byte) for byte in self._bytes(ids))

    def _bytes(self, token: int) -> bytes:
        extra = token - len(self.pieces)
        if extra < 0:
            return self.pieces[token].encode()
        return bytes(["é".encode()[extra % 2]])


def space_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama 2's: spaces begin words, a text's first is dropped, bytes are tokens `<0xNN>`."""
    words = [
        *"▁!\n",
        "<s>",
        "ing",
        *(f"▁{word}" for word in ("a", "is", "of", "the", "to", "world")),
    ]
    words += [*"abcdefghijklmnopqrstuvwxyz"]
    pieces = words + [f"<0x{byte:02X}>" for byte in "世ég😀".encode()]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


class RandomLengths:
    """A length source that asks for anything from 0 to the ceiling, and keeps what it hears."""

    def __init__(self, seed: int, overshoot: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._overshoot = overshoot
        self.facts: list[StepFacts] = []

    def choose(self, batch: DecodeBatch) -> Choice:
        top = batch.ceiling.astype(np.int64) + self._overshoot
        lengths = self._rng.integers(0, top + 1) if batch.size else np.empty(0, np.int64)
        lengths[self._rng.random(batch.size) < 0.25] = 0
        return Choice.fixed(lengths, source="policy")

    def report(self, facts: StepFacts) -> None:
        self.facts.append(facts)

    def close(self) -> None:
        pass


class RandomProposer:
    """Proposes anything, and sometimes less than it promised."""

    name = "random"
    trees = False
    features: tuple[str, ...] = ()
    caches = ()

    def __init__(self, max_length: int, seed: int, vocabulary: int = VOCABULARY) -> None:
        self.max_length = max_length
        self._rng = np.random.default_rng(seed)
        self._vocabulary = vocabulary

    def available(self, sequences: list[Sequence]) -> Availability:
        ceiling = self._rng.integers(0, self.max_length + 1, len(sequences)).astype(np.uint8)
        return Availability(ceiling, np.empty((0, len(sequences)), np.float32))

    def propose(self, sequences: list[Sequence], lengths: npt.NDArray[np.int64]) -> Proposal:
        sizes = [int(self._rng.integers(0, n + 1)) for n in lengths]
        drawn = [self._rng.integers(0, self._vocabulary, n).tolist() for n in sizes]
        return Proposal([DraftTree.chain(tokens) for tokens in drawn])

    def accepted(self, sequences: list[Sequence], paths: list[list[int]]) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        pass


class RandomTrees(RandomProposer):
    """Trees of any shape and size, chains among them, with the right path somewhere in many.

    Parameters
    ----------
    expected : the answers, by prompt
    """

    name = "random_trees"
    trees = True

    def __init__(
        self, max_length: int, seed: int, expected: Mapping[tuple[int, ...], tuple[int, ...]]
    ) -> None:
        super().__init__(max_length, seed)
        self._expected = expected
        self.num_scattered = 0  #: accepted paths that were not the first nodes of their tree

    def available(self, sequences: list[Sequence]) -> Availability:
        offer = super().available(sequences)
        return offer._replace(ceiling=np.full(len(sequences), self.max_length, np.uint8))

    def propose(self, sequences: list[Sequence], lengths: npt.NDArray[np.int64]) -> Proposal:
        pairs = zip(sequences, lengths.tolist(), strict=True)
        return Proposal([self._tree(sequence, size) for sequence, size in pairs])

    def _tree(self, sequence: Sequence, size: int) -> DraftTree:
        rest = self._expected[tuple(sequence.request.prompt)][sequence.num_output :]
        spread = self._rng.choice([0.0, 0.3, 1.0])  # of the parents; 0: a chain
        tree, depths = DraftTree([], []), {ROOT: 0}
        right = ROOT  # the last node of the right path
        for node in range(size):
            parent = node - 1
            if self._rng.random() < spread:
                parent = int(self._rng.integers(ROOT, node))
                parent = right if self._rng.random() < 0.5 else parent
            depth = depths[node] = depths[parent] + 1
            token = int(self._rng.integers(self._vocabulary))
            if parent == right and depth <= len(rest) and self._rng.random() < 0.6:
                token, right = rest[depth - 1], node
            tree.tokens.append(token)
            tree.parents.append(parent)
        return tree

    def accepted(self, sequences: list[Sequence], paths: list[list[int]]) -> None:
        self.num_scattered += sum(path != list(range(len(path))) for path in paths)


def answers(
    worker: Worker, between: Callable[[int], None] = lambda step: None
) -> dict[int, Finished]:
    """Step until there is nothing left to do; ``between`` is called before each step."""
    finished: dict[int, Finished] = {}
    step = 0
    while worker.has_work:
        between(step)
        step += 1
        assert step < 20_000, "the worker does not come to an end"
        for event in worker.step().events:
            if isinstance(event, Finished):
                assert event.id not in finished
                finished[event.id] = event
    return finished


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_token(letter: str) -> int:
    """Token of an ASCII letter in models of `save_tiny_model`."""
    return sorted(pre_tokenizers.ByteLevel.alphabet()).index(letter) + 1


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A model directory that transformers loads: random weights, a token per byte, a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {letter: i for i, letter in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
