"""Proposers by their names, and what a daemon is told of them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from tiny_models import tiny_head, tiny_model

from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.model import LoadedModel
from smartspec.engine_adapter.reference.replies import Ready
from smartspec.engine_adapter.reference.service import HEADS, ProposerName, link_to, make_proposer

FACTS = Ready(
    model="tiny", draft_model="", proposer="lookup", features=(), max_length=8, own_length=3,
    max_num_running=4, max_model_len=64, device="cpu", dtype="float64", engine_version="0",
    tokenizer="", vocabulary_size=48,
)  # fmt: skip


@pytest.mark.parametrize("name", ["lookup", "draft", "lookup-tree", "draft-tree", "none"])
def test_proposer_is_the_one_of_that_name(name: ProposerName) -> None:
    target = LoadedModel("tiny", "", tiny_model("llama"), None, frozenset())
    made = make_proposer(
        name, 6, target, draft_drop_layers=[1], max_num_running=2, max_model_len=32
    )
    assert made.name == name
    assert made.max_length == (0 if name == "none" else 6)


def test_drafter_is_loaded_and_must_be_the_targets(tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    tiny_head(tiny_model("llama")).save(file)
    target = LoadedModel("tiny", "", tiny_model("llama"), None, frozenset())
    for name in HEADS:
        made = make_proposer(name, 6, target, drafter=file, max_num_running=2, max_model_len=32)
        assert (made.name, made.max_length) == (name, 6)
    with pytest.raises(ValueError, match="made for another model"):  # the default model's
        make_proposer("eagle", 6, target, max_num_running=2, max_model_len=32)


@pytest.mark.parametrize("name", ["draft", "draft-tree"])
def test_draft_model_is_needed_to_draft(name: ProposerName) -> None:
    target = LoadedModel("tiny", "", tiny_model("llama"), None, frozenset())
    with pytest.raises(ValueError, match=f"proposer {name} needs a draft model"):
        make_proposer(name, 6, target, max_num_running=2, max_model_len=32)


@pytest.mark.parametrize(
    ("name", "known_first", "trees", "confidences"),
    [("lookup", True, False, False), ("draft", False, False, True),
     ("eagle", False, True, True), ("lookup-tree", True, True, False),
     ("draft-tree", False, True, True), ("eagle-chain", False, False, True)],
)  # fmt: skip
def test_daemon_is_told_what_lengths_mean(
    name: str, known_first: bool, trees: bool, confidences: bool
) -> None:
    link = link_to("ipc:///nowhere.sock", "worker-0")(msgspec.structs.replace(FACTS, proposer=name))
    assert isinstance(link, EngineLink)
    limits = link.hello.limits
    link.close()
    assert (limits.drafts_known_first, limits.trees) == (known_first, trees)
    assert limits.confidences == confidences


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"device cuda: this torch .* (without CUDA|no GPU)"):
        models.load("/nowhere", device="cuda")
