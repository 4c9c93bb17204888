"""Answers are the target's own, training foresees what drafting will see, and it learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, save_tiny_model, tiny_head, tiny_model
from torch import Tensor

from smartspec.engine_adapter.base import FixedLength
from smartspec.engine_adapter.reference import feature_head
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.events import Finished
from smartspec.engine_adapter.reference.feature_draft import FeatureChain
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.sequence import Request
from smartspec.engine_adapter.reference.worker import Worker
from smartspec.lab.distill import answers as data
from smartspec.lab.distill import command, training
from smartspec.lab.distill.answers import Answer, Asked

LAYERS = (1, 2)
PROMPTS = [[(3 * i + j) % VOCABULARY for j in range(2 + i % 5)] for i in range(12)]


def answered(hot: float = 0.0, size: int = 24) -> list[Answer]:
    target = tiny_model("llama").float()
    asked = [Asked(prompt, hot) for prompt in PROMPTS]
    found = data.answer(ModelRunner(target, 5, 64), asked, frozenset({7}), size)
    return [answer for _, answer in sorted(found, key=lambda pair: pair[0])]


def test_answers_are_what_the_worker_says() -> None:
    worker = Worker(
        tiny_model("llama").float(), max_num_running=2, max_model_len=64,
        eos_token_ids=frozenset({7}),
    )  # fmt: skip
    ids = [worker.add_request(Request(prompt, 24)) for prompt in PROMPTS]
    said: dict[int, list[int]] = {}
    while worker.has_work:
        for event in worker.step().events:
            if isinstance(event, Finished):
                said[event.id] = event.tokens
    for answer, number, prompt in zip(answered(), ids, PROMPTS, strict=True):
        assert answer.tokens.tolist() == prompt + said[number]


def test_batches_hold_what_the_target_holds_while_it_reads() -> None:
    target = tiny_model("llama").float()
    found = answered(hot=0.9)
    batch = training.batch_of(target, found, LAYERS)
    runner = ModelRunner(tiny_model("llama").float(), 1, 64)
    P = batch.num_prompt
    assert max(len(prompt) for prompt in PROMPTS) == P
    for i, answer in enumerate(found):
        size = len(answer.tokens) - 1
        text = answer.tokens.tolist()
        begin, end = P - answer.num_prompt, P + size - answer.num_prompt
        logits, features = runner.forward_with_features([Segment(0, 0, text[:size], size)], LAYERS)
        assert batch.present[i].nonzero()[:, 0].tolist() == list(range(begin, end))
        assert batch.tokens[i, begin:end].tolist() == text[:size]
        assert batch.said[i, : end - P].tolist() == text[answer.num_prompt + 1 :]
        assert (batch.said[i, end - P :] == -1).all()
        near = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(batch.features[i, begin + 1 : end], features[:-1], **near)
        assert not batch.features[i, begin].any()
        torch.testing.assert_close(batch.final[i, begin:end], features[:, -32:], **near)
        torch.testing.assert_close(batch.log_mass[i, begin:end], logits.logsumexp(-1), **near)
        assert batch.log_mass[i].isfinite().sum() == size


def test_long_prompts_are_shown_by_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_model("llama").float()
    found = answered()
    whole = training.batch_of(target, found, LAYERS)
    monkeypatch.setattr(training, "MAX_PROMPT_TOKENS", 3)
    cut = training.batch_of(target, found, LAYERS)
    assert cut.num_prompt == 3
    for name in ("tokens", "features", "present", "final", "log_mass"):
        expected = getattr(whole, name)[:, whole.num_prompt - 3 :]
        assert torch.equal(getattr(cut, name), expected), name


def test_an_answer_that_goes_round_in_circles_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LOOP_TOKENS", 12)
    monkeypatch.setattr(data, "LONGEST_LOOP", 4)
    tokens = torch.tensor([[1, 2, 5, 6, 7, 8, 9, 10, *[1, 2, 3] * 4, 0]])
    begin = torch.tensor([2])
    ended = [bool(data.loops(tokens, begin, torch.tensor([last]))) for last in range(2, 20)]
    assert ended == [False] * 17 + [True]
    assert not data.loops(tokens, torch.tensor([9]), torch.tensor([19]))  # some is the prompt's


def test_hot_answers_are_drawn_as_the_target_has_them() -> None:
    target = tiny_model("llama").float()
    asked = [Asked([3, 5], 0.7)] * 600
    found = data.answer(ModelRunner(target, 64, 40), asked, frozenset(), 1)
    counts = torch.zeros(VOCABULARY)
    for _, one in found:
        counts[one.tokens[2]] += 1
    logits = ModelRunner(target, 1, 8).forward([Segment(0, 0, [3, 5], 1)])[0]
    expected = 600 * (logits / 0.7).softmax(-1)
    often = expected > 5
    assert (((counts - expected) ** 2 / expected)[often]).sum() < 2 * often.sum()


def test_no_prompt_is_begun_when_time_is_up() -> None:
    runner = ModelRunner(tiny_model("llama").float(), 3, 64)
    asked = [Asked(prompt, 0.0) for prompt in PROMPTS]
    found = list(data.answer(runner, asked, frozenset(), 8, until=0.0))
    assert 0 < len(found) < len(PROMPTS)
    assert all(len(answer.tokens) == answer.num_prompt + 8 for _, answer in found)


def test_a_prompt_without_room_is_refused() -> None:
    runner = ModelRunner(tiny_model("llama").float(), 3, 40)
    with pytest.raises(ValueError, match="a prompt of 17 tokens has no room"):
        list(data.answer(runner, [Asked(list(range(17)), 0.0)], frozenset(), 8))


def test_what_was_answered_when_time_was_up_is_kept_and_the_rest_asked_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SHARD_ANSWERS", 5)
    target = tiny_model("llama").float()
    asked = [Asked(prompt, 0.0) for prompt in PROMPTS]
    how = {"eos_token_ids": frozenset({7}), "max_answer_tokens": 24}
    runner = ModelRunner(target, 4, 64)
    first = [one for part in data.record(tmp_path, runner, asked, until=0.0, **how) for one in part]
    assert 0 < len(first) < len(PROMPTS)
    # With other rows, too: a folder is gone on with wherever there is room.
    runner = ModelRunner(target, 9, 64)
    rest = [one for part in data.record(tmp_path, runner, asked, **how) for one in part]
    assert len(first) + len(rest) == len(PROMPTS)
    kept = [one for file in sorted(tmp_path.iterdir()) for one in data.read(file)]
    assert sorted(a.tokens.tolist() for a in kept) == sorted(a.tokens.tolist() for a in answered())
    assert not list(data.record(tmp_path, runner, asked, **how))


def test_recording_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SHARD_ANSWERS", 5)
    runner = ModelRunner(tiny_model("llama").float(), 3, 64)
    asked = [Asked(prompt, 0.0) for prompt in PROMPTS]
    how = {"eos_token_ids": frozenset({7}), "max_answer_tokens": 24}
    assert len(list(data.record(tmp_path, runner, asked, **how))) == 3
    files = sorted(tmp_path.iterdir())
    files[1].unlink()
    (again,) = data.record(tmp_path, runner, asked, **how)
    assert len(again) == 5
    whole = [answer for file in files for answer in data.read(file)]
    told = [(answer.num_prompt, answer.tokens.tolist()) for answer in whole]
    assert told == sorted(told, key=lambda one: one[0])  # of like lengths together
    assert sorted(told) == sorted((a.num_prompt, a.tokens.tolist()) for a in answered())


def test_score_is_what_the_worker_accepts() -> None:
    """So that training's rounds see exactly what drafting sees: positions, states and all."""
    target = tiny_model("llama").float()
    head = tiny_head(tiny_model("llama")).float()
    found = answered()
    trained = list(training.train(head, target, found, num_rounds=4, epochs=30, batch_tokens=60))
    assert trained
    head.eval()
    batches = [training.batch_of(target, found[i : i + 5], LAYERS) for i in range(0, len(found), 5)]
    score = training.score(head, batches, 4)
    worker = Worker(
        target, proposer=FeatureChain(head, 4, 64, 4, copies=False), length_source=FixedLength(4),
        max_num_running=4, max_model_len=64, eos_token_ids=frozenset({7}),
    )  # fmt: skip
    for prompt in PROMPTS:
        # One more token to go than the answer has, or the last drafts were cut for want of room.
        worker.add_request(Request(prompt, 24))
    accepted = steps = 0
    while worker.has_work:
        facts = worker.step().facts
        if facts is not None:
            accepted += int(facts.num_accepted.sum())
            steps += len(facts.num_accepted)
    assert score.accepted > 0.3
    assert score.accepted == pytest.approx(accepted / steps, rel=0.02)


def test_training_lowers_the_loss_and_the_file_can_be_loaded(tmp_path: Path) -> None:
    found = answered()
    target = tiny_model("llama").float()
    head = training.new_head(target, found, LAYERS, 24, torch.arange(40))
    losses = [
        step.loss
        for step in training.train(
            head, target, found, epochs=40, learning_rate=1e-2, batch_tokens=60, every=10
        )
    ]
    assert losses[-1] < 0.7 * losses[0]
    head.save(tmp_path / "head.safetensors")
    again = feature_head.load(tmp_path / "head.safetensors", target)
    assert again.token_ids.tolist() == head.token_ids.tolist()


@pytest.mark.parametrize("kind", ["kl", "reverse-kl", "tv"])
def test_divergence_is_least_where_the_draft_says_what_the_target_says(
    kind: training.Loss,
) -> None:
    torch.manual_seed(0)
    whole = torch.randn(3, 9).log_softmax(-1)
    aim = whole[:, :6]  # the target says three more tokens, which cannot be drafted

    def loss(logits: Tensor) -> Tensor:
        return training.divergence(kind, aim.clone(), logits)[0]

    assert loss(aim.clone()).abs().max() < 1e-6
    for _ in range(20):
        assert (loss(aim + 0.3 * torch.randn(3, 6)) > 0).all()


def test_prompts_teach_the_first_draft_and_later_rounds_come_late() -> None:
    found = answered()
    head = tiny_head(tiny_model("llama")).float()
    batch = training.batch_of(tiny_model("llama").float(), found, LAYERS)
    rounds = list(training.rounds(head, batch, 3))
    in_prompts = [int(counts[:, : -batch.said.shape[1]].sum()) for _, counts in rounds]
    assert in_prompts == [sum(len(prompt) for prompt in PROMPTS), 0, 0]
    assert [training.rounds_at(i / 10, 3) for i in (1, 4, 5, 6, 8, 10)] == [1, 1, 2, 2, 3, 3]
    assert training.rounds_at(1.0, 1) == 1


@pytest.mark.parametrize("kind", ["kl", "reverse-kl", "tv"])
def test_gradient_is_the_slope_of_the_divergence(
    kind: training.Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHUNK_TOKENS", 2)
    torch.manual_seed(0)
    matrix, final = torch.randn(6, 4, dtype=torch.double), torch.randn(5, 4, dtype=torch.double)
    log_mass, weight = torch.full((5,), 4.0), torch.rand(5)
    read = torch.randn(5, 4, dtype=torch.double, requires_grad=True)

    def total(read: Tensor) -> Tensor:
        return training.Divergence.apply(read, final, log_mass, weight, matrix, kind)

    total(read).backward()
    for i in range(5):
        for j in range(4):
            step = torch.zeros_like(read)
            step[i, j] = 1e-2
            slope = (total(read.detach() + step) - total(read.detach() - step)) / 2e-2
            assert read.grad is not None
            assert float(read.grad[i, j]) == pytest.approx(float(slope), abs=2e-3)


def test_prompts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "abc"}\n{"question": "abc"}\n')
    with pytest.raises(ValueError, match="line 2: expected an object with a prompt"):
        data.read_prompts(file)
    file.write_text('{"prompt": 3}\n')
    with pytest.raises(ValueError, match="line 1: expected an object with a prompt"):
        data.read_prompts(file)
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: expected an object"):
        data.read_prompts(file)
    file.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n\n")
    assert data.read_prompts(file) == ["a\u2028b"]


def test_a_prompt_of_its_own_ends_where_the_users_turn_does() -> None:
    class Words:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return "".join(chr(token) for token in tokens if token != 7)

    def said(text: str, last: int) -> str:
        tokens = torch.tensor([1, *map(ord, text), last])
        return data.as_prompt(Answer(tokens, 1, 1.0), Words(), "[/I]", frozenset({7}))

    assert said(" Why? ", 7) == "Why?"
    assert said(" Why? [/I] Because.", ord("!")) == "Why?"
    assert said(" Why", ord("?")) == ""


def test_what_one_tests_on_is_not_asked(tmp_path: Path) -> None:
    file = tmp_path / "tested.jsonl"
    eight = "who was the first man on the moon"
    file.write_text(json.dumps({"question_id": 3, "turns": [f"Tell me: {eight}", "And why?"]}))
    seven = "who was the first man on Mars"
    texts = [f"I ask {eight.upper()} again", seven, "and why?", "and why so?"]
    assert data.unlike(texts, file) == [seven, "and why so?"]


class Letters:
    """A tokenizer with a chat template."""

    chat_template = "[]"

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]

    def apply_chat_template(self, turns: list[dict[str, str]], **_: Any) -> str:
        return f"<{turns[0]['content']}>"


def test_prompts_go_into_the_template_and_what_is_too_long_is_left_out() -> None:
    tokens = data.in_template(["ab", "abcdef", "c"], Letters(), 4)
    assert ["".join(map(chr, one)) for one in tokens] == ["<ab>", "<c>"]
    assert data.around_user(Letters()) == ([ord("<")], ">")
    plain = Letters()
    plain.chat_template = ""
    with pytest.raises(ValueError, match="take a model with a chat template: give a file"):
        data.around_user(plain)


def test_head_begins_as_the_targets_last_layer_where_it_fits() -> None:
    target = tiny_model("llama").float()
    found = answered()
    own: Any = target
    layer = own.model.layers[-1]
    same = training.new_head(target, found, LAYERS, 48, torch.arange(40))
    assert torch.equal(same.query.weight, layer.self_attn.q_proj.weight)
    ratio = same.down.weight / layer.mlp.down_proj.weight
    assert ratio.std() < 1e-4 and ratio.mean() != 1
    other = training.new_head(target, found, LAYERS, 24, torch.arange(40))
    assert not torch.equal(other.query.weight, layer.self_attn.q_proj.weight)
    training.new_head(tiny_model("gpt2").float(), found, LAYERS, 48, torch.arange(40))


def test_command_makes_a_drafter_and_answers_only_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(save_tiny_model(tmp_path / "model"))
    prompts, out, work = tmp_path / "prompts.jsonl", tmp_path / "own.safetensors", tmp_path / "work"
    lines = [json.dumps({"prompt": f"{i} and {i + 1}"}) for i in range(9)]
    prompts.write_text("\n".join(lines))
    recipe = command.Recipe(max_answer_tokens=20, held_out=2, epochs=2, intermediate_size=24)
    assert command.run(prompts, out, work, recipe, model=model, device="cpu", as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_answers"] == 9
    assert told["bytes"] == out.stat().st_size
    assert 0 <= told["held_out_accepted_per_step"] <= recipe.num_rounds
    assert len(told["held_out_right_by_depth"]) == recipe.num_rounds
    feature_head.load(out, models.load(model, device="cpu").model)
    again = replace(recipe, epochs=1)
    assert command.run(prompts, out, work, again, model=model, start=out, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["num_answers"] == 0
    empty = tmp_path / "empty"
    assert command.run(prompts, out, empty, recipe, model=model, train_only=True) == 2
    assert "too few answers: 0" in capsys.readouterr().err


class Shop:
    """The command in a folder with two models, nine prompts and answers of the first."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.work, self._capsys = folder, folder / "work", capsys
        self.one, self.other = (
            str(save_tiny_model(folder / name, seed)) for seed, name in enumerate(("one", "other"))
        )
        self.recipe = command.Recipe(
            max_answer_tokens=20, held_out=2, epochs=1, intermediate_size=24, layers=(1, 2)
        )
        self.prompts = folder / "prompts.jsonl"
        self.write_prompts(9)
        self.must(self.one)

    def write_prompts(self, count: int) -> None:
        lines = [json.dumps({"prompt": f"{i} and {i + 1}"}) for i in range(count)]
        self.prompts.write_text("\n".join(lines))

    def run(self, model: str, out: Path | None = None, **changes: Any) -> str | None:
        """What was wrong, or None."""
        how = {name: changes.pop(name) for name in ("start", "train_only") if name in changes}
        recipe = replace(self.recipe, **changes)
        self._capsys.readouterr()
        status = command.run(self.prompts, out, self.work, recipe, model=model, device="cpu", **how)
        told = self._capsys.readouterr().err
        assert status in (0, 2)
        return told.splitlines()[-1] if status else None

    def must(self, model: str, out: Path | None = None, **changes: Any) -> None:
        assert self.run(model, out, **changes) is None


@pytest.fixture
def shop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shop:
    return Shop(tmp_path, capsys)


OF_ANOTHER = "are of another model or recipe: give another --work"


@pytest.mark.parametrize("train_only", [False, True])
def test_answers_of_another_model_are_refused(shop: Shop, train_only: bool) -> None:
    out = shop.folder / "own.safetensors"
    told = shop.run(shop.other, out, train_only=train_only)
    assert told is not None and told.endswith(f"answers in {shop.work / 'part-0'} {OF_ANOTHER}")
    assert not out.exists()
    # Nor are those of another process mixed with this one's.
    assert OF_ANOTHER in str(shop.run(shop.other, part=1, parts=2))
    assert not (shop.work / "part-1").exists()


@pytest.mark.parametrize(
    "change", [{"hot": 0.5}, {"seed": 1}, {"max_answer_tokens": 19}, {"parts": 2}]
)
def test_answers_of_another_recipe_are_refused(shop: Shop, change: dict[str, Any]) -> None:
    assert OF_ANOTHER in str(shop.run(shop.one, **change))


def test_answers_to_other_prompts_are_refused(shop: Shop) -> None:
    shop.write_prompts(10)
    assert OF_ANOTHER in str(shop.run(shop.one))


def test_training_asks_only_for_the_target(shop: Shop) -> None:
    out, own = shop.folder / "own.safetensors", {"train_only": True}
    shop.must(shop.one, out, seed=1, max_answer_tokens=10, layers=(0, 2), **own)
    target = models.load(shop.one, device="cpu").model
    assert feature_head.load(out, target).config.layers == (0, 2)
    # From a drafter on, the layers are the drafter's.
    shop.must(shop.one, out, start=out, layers=(), **own)
    assert feature_head.load(out, target).config.layers == (0, 2)
    assert "the model has" in str(shop.run(shop.one, out, layers=(99,), **own))


def test_time_ends_training_at_the_lowest_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    target, found = tiny_model("llama").float(), answered()
    head = training.new_head(target, found, LAYERS, 24, torch.arange(40))
    clock = iter(range(1000))  # a second a step
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(clock)))
    rates = []
    step = torch.optim.AdamW.step

    def noted(self: Any, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    told = list(training.train(head, target, found, epochs=500, minutes=0.5, every=7))
    assert (told[-1].step, told[-1].share, len(rates)) == (30, 1.0, 30)
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[-1] < 0.05 * max(rates)
    clock = iter(range(0, 1000, 10))
    (only,) = training.train(head, target, found, epochs=500, minutes=0.0)
    assert (only.step, only.share) == (1, 1.0)


def test_prompts_of_its_own_are_made_once_by_each_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}a {{ m.content }} b{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    work, out = tmp_path / "work", tmp_path / "own.safetensors"
    recipe = command.Recipe(
        own_prompts=41, parts=2, max_answer_tokens=12, held_out=2, epochs=1, intermediate_size=24,
        num_rounds=2,
    )  # fmt: skip
    tested = tmp_path / "tested.jsonl"
    tested.write_text('{"turns": ["never said by anybody"]}\n')
    monkeypatch.setattr(command, "NUM_ROWS", 8)  # time is looked at when all have begun that can
    early = replace(recipe, answer_minutes=0.0, parts=1)
    assert command.run(None, out, work / "early", early, model=str(model), device="cpu") == 2
    assert "of 41 prompts of its own: the same command goes on" in capsys.readouterr().err
    assert not list((work / "early").glob("part-0/[0-9]*"))  # they would be answers to others
    monkeypatch.undo()
    later = replace(early, answer_minutes=60.0)
    assert command.run(None, None, work / "early", later, model=str(model), device="cpu") == 0
    capsys.readouterr()
    told = []
    for part in (0, 1, 1):
        own = replace(recipe, part=part)
        where = None if part == 0 else out
        status = command.run(
            None, where, work, own, model=str(model), unlike=tested, device="cpu", as_json=True
        )
        printed = capsys.readouterr()
        assert status == 0, printed.err
        told.append((json.loads(printed.out)["num_answers"], printed.err))
    assert "the model makes up 21 prompts" in told[0][1]
    assert "the model makes up 20 prompts" in told[1][1]
    assert told[0][0] > 0 and told[1][0] > 0 and told[2][0] == 0
    assert command.run(None, None, work, replace(recipe, seed=1), model=str(model)) == 2
    assert OF_ANOTHER in capsys.readouterr().err


def test_answers_that_do_not_say_of_whom_they_are_are_refused(shop: Shop) -> None:
    (shard,) = shop.work.rglob("*.safetensors")
    save_file(load_file(shard), shard)
    out = shop.folder / "own.safetensors"
    assert OF_ANOTHER in str(shop.run(shop.one, out))
    assert OF_ANOTHER in str(shop.run(shop.one, out, train_only=True))


def test_a_drafter_among_the_answers_is_not_taken_for_answers(shop: Shop) -> None:
    for out in (shop.work / "own.safetensors", shop.work / "part-0" / "own.safetensors"):
        shop.must(shop.one, out)
        shop.must(shop.one, out, train_only=True)


def test_damaged_answers_are_named(shop: Shop) -> None:
    (shard,) = shop.work.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} is damaged, remove it" in str(shop.run(shop.one))


@pytest.mark.parametrize("layers", [(1, 99), (-1,)])
def test_layers_that_the_model_has_not_are_refused(shop: Shop, layers: tuple[int, ...]) -> None:
    told = shop.run(shop.one, layers=layers)
    assert told is not None and told.endswith("the model has 2 (0: before the first)")
