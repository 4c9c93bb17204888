"""`smartspec distill`: answers, training, and what came of it."""

from __future__ import annotations

import json
import math
import random
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

#: Rows of the cache, those that take prompts in among them: on a CPU, and at most.
NUM_ROWS, NUM_ROWS_ACCELERATOR = 144, 2304
OWN_PROMPT_TEMPERATURE = 1.0
OWN_PROMPT_SEED = 1 << 20  #: other luck than the answers'
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
    own_prompts : so many the target makes up itself, beside those that are given
    max_prompt_tokens, max_answer_tokens : longer prompts are left out, longer answers ended
    hot : temperature of every third answer; the others are greedy
    part, parts : which of how many processes answers; the others' prompts are left alone
    answer_minutes, train_minutes : at most, of each
    held_out : answers that are not trained on, but scored
    num_rounds : drafts in a row that are trained for
    """

    layers: tuple[int, ...] = ()
    num_draft_tokens: int = 8192
    intermediate_size: int = 1536
    own_prompts: int = 0
    max_prompt_tokens: int = 800
    max_answer_tokens: int = 192
    hot: float = 0.8
    part: int = 0
    parts: int = 1
    answer_minutes: float = math.inf
    held_out: int = 64
    num_rounds: int = 5
    loss: training.Loss = "kl"
    epochs: int = 3
    train_minutes: float = math.inf
    learning_rate: float = 1e-3
    batch_tokens: int = 2048
    seed: int = 0


def run(
    prompts: Path | None,
    out: Path | None,
    work: Path,
    recipe: Recipe,
    *,
    model: str | None = None,
    unlike: Path | None = None,
    start: Path | None = None,
    train_only: bool = False,
    device: str = "auto",
    threads: int | None = None,
    as_json: bool = False,
) -> int:
    """Make a drafter. Returns the exit status.

    Parameters
    ----------
    prompts : what the target is to answer, beside its own
    out : the drafter's file; None: only answer
    work : folder of the answers
    unlike : texts to be tested on: what shares eight words in a row with them is not asked
    start : a drafter to train on from
    train_only : make do with the answers that there are
    """
    if threads is not None:
        torch.set_num_threads(threads)
    load = partial(models.load, model, device=device)
    told: dict[str, Any] = {}
    try:
        if not train_only:
            told |= _answer(prompts, work, unlike, recipe, load)
        if out is not None:
            told |= _train(out, work, recipe, start, load)
    except (models.ModelNotAvailable, OSError, RuntimeError, ValueError) as error:
        print(f"smartspec distill: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(told))
    else:
        for name, value in told.items():
            print(f"{name}: {value}")
    return 0


def _layers(recipe: Recipe, target: Any) -> tuple[int, ...]:
    """Those that a new drafter reads. Raises ValueError."""
    depth = target.config.get_text_config().num_hidden_layers
    if any(not 0 <= layer <= depth for layer in recipe.layers):
        told = ",".join(map(str, recipe.layers))
        raise ValueError(f"--layers {told}: the model has {depth} (0: before the first)")
    return recipe.layers or (max(1, depth // 10), depth // 2, depth)


def _shards(work: Path, target: Any) -> list[Path]:
    """Files of all parts' answers. Raises ValueError where one is not of this target."""
    files = sorted(work.glob("part-*/[0-9]*.safetensors"))
    expected = data.origin(target)
    for file in files:
        data.check(file, expected)
    return files


def _answer(
    prompts: Path | None, work: Path, unlike: Path | None, recipe: Recipe, load: Load
) -> dict[str, Any]:
    # What training reads is as the answers were given; and the pass is much faster.
    target = load(dtype="bfloat16")
    _layers(recipe, target.model)
    _shards(work, target.model)  # refused now rather than after an hour of answers
    limit = getattr(target.model.config, "max_position_embeddings", None) or 1 << 30
    room = recipe.max_answer_tokens + data.CHECK_STEPS
    longest = min(recipe.max_prompt_tokens, limit - room)
    if longest < 1:
        raise ValueError(f"the model reads {limit} tokens: lower --max-answer-tokens")
    texts = data.read_prompts(prompts) if prompts is not None else []
    texts = texts[recipe.part :: recipe.parts]
    num_own = len(range(recipe.part, recipe.own_prompts, recipe.parts))
    # No more rows than prompts, with those that take prompts in.
    num_rows = min(_num_rows(target.model, longest + room), 2 + 2 * (len(texts) + num_own))
    runner = ModelRunner(target.model, num_rows, longest + room)
    folder = work / f"part-{recipe.part}"
    begin = time.monotonic()
    how: dict[str, Any] = {
        "until": begin + 60 * recipe.answer_minutes,
        "eos_token_ids": target.eos_token_ids,
        "max_answer_tokens": recipe.max_answer_tokens,
    }
    if num_own:
        texts += _own_prompts(folder / "own", runner, target, longest, num_own, recipe, how)
    if unlike is not None:
        num_found = len(texts)
        texts = data.unlike(texts, unlike)
        _say(f"{num_found - len(texts)} of {num_found} prompts left out: like those of {unlike}")
    given = data.in_template(texts, target.tokenizer, longest)
    if not given:
        raise ValueError(f"there is no prompt of at most {longest} tokens")
    random.Random(recipe.seed).shuffle(given)
    asked = [
        data.Asked(tokens, recipe.hot if i % 3 == 0 else 0.0) for i, tokens in enumerate(given)
    ]
    shards = data.record(folder, runner, asked, seed=recipe.seed + recipe.part, **how)
    num_answers = num_tokens = 0
    said = begin
    for shard in shards:
        num_answers += len(shard)
        num_tokens += sum(len(answer.tokens) - answer.num_prompt for answer in shard)
        if time.monotonic() > said + 2:
            said = time.monotonic()
            pace = num_tokens / (said - begin)
            _say(f"{num_answers} of {len(asked)} prompts answered, {pace:.0f} answer tokens/s")
    return {"num_answers": num_answers, "num_answer_tokens": num_tokens}


def _num_rows(target: Any, width: int) -> int:
    """On a GPU as many as half of the memory has room for."""
    if target.device.type != "cuda":
        return NUM_ROWS
    config = target.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_row = 2 * config.num_hidden_layers * heads * size * width * target.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(target.device)
    return max(2, min(NUM_ROWS_ACCELERATOR, int(free // 2 // a_row)))


def _own_prompts(
    folder: Path,
    runner: ModelRunner,
    target: models.LoadedModel,
    longest: int,
    count: int,
    recipe: Recipe,
    how: dict[str, Any],
) -> list[str]:
    """What the target says in a user's place, kept as answers are."""
    before, after = data.around_user(target.tokenizer)
    if len(before) > longest:
        raise ValueError(f"prompts of its own begin with {len(before)} tokens: {longest} may be")
    asked = [data.Asked(before, OWN_PROMPT_TEMPERATURE)] * count
    seed = OWN_PROMPT_SEED + recipe.seed + recipe.part
    _say(f"the model makes up {count} prompts")
    for _ in data.record(folder, runner, asked, seed=seed, **how):
        pass
    said = [one for file in sorted(folder.glob("[0-9]*.safetensors")) for one in data.read(file)]
    if len(said) < count:  # with the rest the prompts, and so the answers, would be others
        raise ValueError(
            f"time was up with {len(said)} of {count} prompts of its own: the same command goes on"
        )
    said = said[:count]
    texts = [data.as_prompt(one, target.tokenizer, after, target.eos_token_ids) for one in said]
    kept = list(dict.fromkeys(filter(None, texts)))
    _say(f"{len(kept)} of {len(said)} prompts of its own come to an end and differ")
    return kept


def _train(out: Path, work: Path, recipe: Recipe, start: Path | None, load: Load) -> dict[str, Any]:
    # The target reads the answers as it gave them; its matrices in the head are exact.
    target = load(dtype="bfloat16").model
    exact = load(dtype="float32").model
    layers = (
        _layers(recipe, target) if start is None else feature_head.load(start, exact).config.layers
    )
    found = [a for file in _shards(work, target) for a in data.read(file)]
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
        vocabulary = target.config.get_text_config().vocab_size
        tokens = training.frequent_tokens(answers, recipe.num_draft_tokens, vocabulary)
        size = recipe.intermediate_size
        head = training.new_head(exact, answers, layers, size, tokens, recipe.seed)
    else:
        head = feature_head.load(start, exact)
    del exact  # but for what the head reads of it
    batches = [
        training.batch_of(target, held_out[i : i + 8], layers) for i in range(0, len(held_out), 8)
    ]
    num_tokens = sum(len(answer.tokens) - answer.num_prompt for answer in answers)
    _say(f"training on {len(answers)} answers of {num_tokens} tokens, and on their prompts")
    progress = training.train(
        head,
        target,
        answers,
        loss=recipe.loss,
        num_rounds=recipe.num_rounds,
        epochs=recipe.epochs,
        minutes=recipe.train_minutes,
        learning_rate=recipe.learning_rate,
        batch_tokens=recipe.batch_tokens,
        seed=recipe.seed,
    )
    how = {name: None if value == math.inf else value for name, value in asdict(recipe).items()}
    told: dict[str, Any] = {}
    scored = 0.0
    for step in progress:
        line = f"step {step.step}, {step.share:.0%}: loss {step.loss:.4f}"
        if step.share == 1 or step.share > scored + 0.1:
            scored = step.share
            result = training.score(head, batches, recipe.num_rounds)
            told = {
                "num_trained_tokens": num_tokens,
                "num_steps": step.step,
                "held_out_accepted_per_step": round(result.accepted, 3),
                "held_out_right_by_depth": [round(share, 3) for share in result.right],
            }
            line += f"; held out: {result.accepted:.3f} accepted per step"
            notes = {"recipe": json.dumps(how), "result": json.dumps(told)}
            head.save(out, notes)
        _say(line)
    return {**told, "file": str(out), "bytes": out.stat().st_size}


def _say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def parse_layers(text: str | None) -> tuple[int, ...]:
    """Of ``3,15,30``. Raises ValueError."""
    return tuple(int(part) for part in (text or "").split(",") if part.strip())
