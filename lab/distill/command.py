"""`smartspec distill`: answers, training, and what came of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smartspec.engine_adapter.reference import feature_head
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.lab.distill import answers as data
from smartspec.lab.distill import training

NUM_ROWS = 128  #: answers that are decoded together
MIN_ANSWER_TOKENS = 8  #: shorter answers are left out

Load = Callable[..., models.LoadedModel]  #: the target, given its ``dtype``


@dataclass(frozen=True)
class Recipe:
    """How a drafter is made; it is written into the drafter's file.

    Parameters
    ----------
    layers : after how many of the target's layers its states are read; (): after a tenth of them,
        half, and all
    num_draft_tokens : how many tokens it can draft, the most frequent
    max_prompt_tokens, max_answer_tokens : longer prompts are left out, longer answers ended
    hot : temperature of every third answer; the others are greedy
    part, parts : which of how many processes answers; the others' prompts are left alone
    held_out : answers that are not trained on, but scored
    num_rounds : drafts in a row that are trained for
    """

    layers: tuple[int, ...] = ()
    num_draft_tokens: int = 8192
    intermediate_size: int = 1536
    max_prompt_tokens: int = 800
    max_answer_tokens: int = 192
    hot: float = 0.8
    part: int = 0
    parts: int = 1
    held_out: int = 64
    num_rounds: int = 5
    loss: training.Loss = "kl"
    epochs: int = 3
    learning_rate: float = 1e-3
    batch_tokens: int = 2048
    seed: int = 0


def run(
    prompts: Path,
    out: Path | None,
    work: Path,
    recipe: Recipe,
    *,
    model: str | None = None,
    start: Path | None = None,
    train_only: bool = False,
    device: str = "auto",
    threads: int | None = None,
    as_json: bool = False,
) -> int:
    """Make a drafter. Returns the exit status.

    Parameters
    ----------
    prompts : what the target is to answer
    out : the drafter's file; None: only answer
    work : folder of the answers
    start : a drafter to train on from
    train_only : make do with the answers that there are
    """
    if threads is not None:
        torch.set_num_threads(threads)
    load = partial(models.load, model, device=device)
    told: dict[str, Any] = {}
    try:
        if not train_only:
            told |= _answer(prompts, work, recipe, start, load)
        if out is not None:
            told |= _train(out, work, prompts, recipe, start, load)
    except (models.ModelNotAvailable, OSError, RuntimeError, ValueError) as error:
        print(f"smartspec distill: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(told))
    else:
        for name, value in told.items():
            print(f"{name}: {value}")
    return 0


def _layers(recipe: Recipe, target: Any, start: Path | None) -> tuple[int, ...]:
    """Those of the drafter to train on from, if there is one. Raises ValueError."""
    if start is not None:
        return feature_head.load(start, target).config.layers
    depth = target.config.get_text_config().num_hidden_layers
    if any(not 0 <= layer <= depth for layer in recipe.layers):
        told = ",".join(map(str, recipe.layers))
        raise ValueError(f"--layers {told}: the model has {depth} (0: before the first)")
    return recipe.layers or (max(1, depth // 10), depth // 2, depth)


def _shards(work: Path, target: Any, layers: tuple[int, ...]) -> list[Path]:
    """Files of all parts' answers. Raises ValueError where one is not of this target."""
    files = sorted(work.glob("part-*/[0-9]*.safetensors"))
    expected = data.origin(target, layers)
    for file in files:
        data.check(file, expected)
    return files


def _answer(
    prompts: Path, work: Path, recipe: Recipe, start: Path | None, load: Load
) -> dict[str, Any]:
    # States are kept in half precision anyhow, and the pass is much faster.
    target = load(dtype="bfloat16")
    layers = _layers(recipe, target.model, start)
    _shards(work, target.model, layers)  # refused now rather than after an hour of answers
    limit = getattr(target.model.config, "max_position_embeddings", None) or 1 << 30
    length = min(recipe.max_prompt_tokens + recipe.max_answer_tokens, limit)
    longest = length - recipe.max_answer_tokens
    asked = data.read_prompts(prompts, target.tokenizer, longest, recipe.hot)
    asked = asked[recipe.part :: recipe.parts]
    shards = data.record(
        work / f"part-{recipe.part}",
        ModelRunner(target.model, min(NUM_ROWS, len(asked)), length),
        asked,
        layers,
        eos_token_ids=target.eos_token_ids,
        max_answer_tokens=recipe.max_answer_tokens,
        seed=recipe.seed + recipe.part,
    )
    num_answers = num_tokens = 0
    begin = time.monotonic()
    for shard in shards:
        num_answers += len(shard)
        num_tokens += sum(len(answer.tokens) - answer.num_prompt for answer in shard)
        pace = num_tokens / (time.monotonic() - begin)
        _say(f"{num_answers} of {len(asked)} prompts answered, {pace:.0f} answer tokens/s")
    return {"num_answers": num_answers, "num_answer_tokens": num_tokens}


def _train(
    out: Path, work: Path, prompts: Path, recipe: Recipe, start: Path | None, load: Load
) -> dict[str, Any]:
    loaded = load(dtype="float32")
    target = loaded.model
    layers = _layers(recipe, target, start)
    found = [a for file in _shards(work, target, layers) for a in data.read(file)]
    # The same answers are held out whatever the number of rounds, or training on from a drafter
    # would be scored on what it was shown before.
    shortest = max(MIN_ANSWER_TOKENS, recipe.num_rounds)
    found = [a for a in found if len(a.tokens) - a.num_prompt > shortest]
    greedy = [i for i, answer in enumerate(found) if answer.temperature == 0]
    kept = set(greedy[:: max(1, len(greedy) // recipe.held_out)][: recipe.held_out])
    held_out = [found[i] for i in sorted(kept)]
    answers = [answer for i, answer in enumerate(found) if i not in kept]
    if not answers or not held_out:
        raise ValueError(f"{work} holds too few answers: {len(found)}")
    if start is None:
        asked = data.read_prompts(prompts, loaded.tokenizer, recipe.max_prompt_tokens, 0.0)
        tokens = training.frequent_tokens(
            answers,
            (one.tokens for one in asked),
            recipe.num_draft_tokens,
            target.config.get_text_config().vocab_size,
        )
        size = recipe.intermediate_size
        head = training.new_head(target, answers, layers, size, tokens, recipe.seed)
    else:
        head = feature_head.load(start, target)
    size = head.config.hidden_size
    batches = [training.batch_of(held_out[i : i + 8], size) for i in range(0, len(held_out), 8)]
    num_tokens = sum(len(answer.tokens) - answer.num_prompt for answer in answers)
    _say(f"training on {len(answers)} answers of {num_tokens} tokens, and on their prompts")
    progress = training.train(
        head,
        answers,
        loss=recipe.loss,
        num_rounds=recipe.num_rounds,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        batch_tokens=recipe.batch_tokens,
        seed=recipe.seed,
    )
    told: dict[str, Any] = {}
    for step in progress:
        line = f"step {step.step} of {step.num_steps}: loss {step.loss:.4f}"
        if step.step == step.num_steps or step.step % 50 == 0:
            result = training.score(head, batches, recipe.num_rounds)
            told = {
                "num_trained_tokens": num_tokens,
                "held_out_accepted_per_step": round(result.accepted, 3),
                "held_out_right_by_depth": [round(share, 3) for share in result.right],
            }
            line += f"; held out: {result.accepted:.3f} accepted per step"
            notes = {"recipe": json.dumps(asdict(recipe)), "result": json.dumps(told)}
            head.save(out, notes)
        _say(line)
    return {**told, "file": str(out), "bytes": out.stat().st_size}


def _say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def parse_layers(text: str | None) -> tuple[int, ...]:
    """Of ``3,15,30``. Raises ValueError."""
    return tuple(int(part) for part in (text or "").split(",") if part.strip())
