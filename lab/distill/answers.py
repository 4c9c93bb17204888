"""The target's own answers, with what its layers held while it gave them.

A drafter has to foresee what *this* target says, so it learns from nothing else: on-policy data,
after DistillSpec (Zhou et al. 2024). The hidden states are kept too: the head reads them, and from
the last of them follows the target's distribution, by one product with its output matrix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from smartspec.engine_adapter.reference.feature_head import fingerprint
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment

SHARD_ANSWERS = 128
POOL_PROMPTS = 512  #: of which those of like lengths are answered together
PASS_PROMPT_TOKENS = 256  #: of new prompts in one pass, about
FORMAT = "answers-2"
#: An answer that goes round in circles of up to so many tokens, for so many, has no more to teach.
LONGEST_LOOP = 32
LOOP_TOKENS = 96


class Asked(NamedTuple):
    """A prompt."""

    tokens: list[int]
    temperature: float


class Answer(NamedTuple):
    """A prompt and its answer, T tokens together."""

    tokens: Tensor  #: [T] int64
    num_prompt: int
    temperature: float
    features: Tensor  #: [T - 1, layers * hidden_size] fp16, after each token but the last
    log_mass: Tensor  #: [T - 1], log of the sum of exp(logits) after each token but the last


@dataclass
class _Row:
    """An answer in the making."""

    place: int
    asked: Asked
    tokens: list[int]
    features: list[Tensor] = field(default_factory=list)
    log_mass: list[Tensor] = field(default_factory=list)

    @property
    def said(self) -> list[int]:
        return self.tokens[len(self.asked.tokens) :]

    @property
    def loops(self) -> bool:
        late = self.said[-LOOP_TOKENS:]
        periods = range(1, LONGEST_LOOP + 1)
        return len(late) == LOOP_TOKENS and any(late[n:] == late[:-n] for n in periods)

    def done(self) -> Answer:
        features, log_mass = torch.cat(self.features), torch.cat(self.log_mass)
        num_prompt = len(self.asked.tokens)
        tokens = torch.tensor(self.tokens)
        return Answer(tokens, num_prompt, self.asked.temperature, features, log_mass)


def answer(
    runner: ModelRunner,
    asked: Sequence[Asked],
    layers: Sequence[int],
    eos_token_ids: frozenset[int],
    max_answer_tokens: int,
    seed: int = 0,
) -> Iterator[tuple[int, Answer]]:
    """Answers, with the places of their prompts, in the order in which they are done.

    As many are decoded together as the runner has rows.
    """
    generator = torch.Generator().manual_seed(seed)
    # Rows are read as far as the longest of them: those of like lengths run together.
    order = [
        place
        for begin in range(0, len(asked), POOL_PROMPTS)
        for place in sorted(
            range(begin, min(begin + POOL_PROMPTS, len(asked))), key=lambda i: len(asked[i].tokens)
        )
    ]
    waiting = [(place, asked[place]) for place in reversed(order)]
    rows: dict[int, _Row] = {}
    free = list(range(runner.cache.num_rows))
    while waiting or rows:
        segments = [
            Segment(row, len(known.tokens) - 1, known.tokens[-1:], 1) for row, known in rows.items()
        ]
        room = PASS_PROMPT_TOKENS  # so that passes are of one size, about
        while waiting and free and room > 0:
            place, prompt = waiting.pop()
            rows[free[-1]] = _Row(place, prompt, list(prompt.tokens))
            segments.append(Segment(free.pop(), 0, prompt.tokens, len(prompt.tokens)))
            room -= len(prompt.tokens)
        logits, features = runner.forward_with_features(segments, layers)
        sizes = [len(segment.tokens) for segment in segments]
        states = torch.split(features.half().cpu(), sizes)
        masses = torch.split(logits.float().logsumexp(-1).cpu(), sizes)
        last = logits[torch.tensor(sizes, device=logits.device).cumsum(0) - 1].float().cpu()
        for segment, line, state, log_mass in zip(segments, last, states, masses, strict=True):
            known = rows[segment.row]
            if known.asked.temperature > 0:
                chances = (line / known.asked.temperature).softmax(-1).cumsum(-1)
                drawn = chances[-1] * torch.rand(1, generator=generator)
                token = min(int(torch.searchsorted(chances, drawn)), len(chances) - 1)
            else:
                token = int(line.argmax())
            known.features.append(state.clone())
            known.log_mass.append(log_mass)
            known.tokens.append(token)
            enough = len(known.said) >= max_answer_tokens
            if token in eos_token_ids or enough or known.loops:
                yield known.place, known.done()
                free.append(segment.row)
                del rows[segment.row]


def origin(target: PreTrainedModel, layers: Sequence[int]) -> dict[str, str]:
    """What all answers that a drafter learns from must share; written into each shard."""
    layers_read = ",".join(map(str, layers))
    return {"format": FORMAT, "target": fingerprint(target), "layers": layers_read}


def record(
    folder: Path, runner: ModelRunner, asked: Sequence[Asked], layers: Sequence[int], **how: Any
) -> Iterator[list[Answer]]:
    """Answer all prompts into a folder of shards; what is there already is not asked again.

    ``how`` : as of `answer`. Yields each shard when it is written. Raises ValueError where a shard
    is there that was made in another way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begins = range(0, len(asked), SHARD_ANSWERS)
    files = [folder / f"{begin:06}.safetensors" for begin in begins]
    common = origin(runner.model, layers)
    origins = [{**common, "recipe": _recipe(asked[i : i + SHARD_ANSWERS], how)} for i in begins]
    there = [file.exists() for file in files]
    for file, expected in compress(zip(files, origins, strict=True), there):
        check(file, expected)
    todo = [i for i in range(len(asked)) if not there[i // SHARD_ANSWERS]]
    shards: dict[int, dict[int, Answer]] = {}
    for place, found in answer(runner, [asked[i] for i in todo], layers, **how):
        number, within = divmod(todo[place], SHARD_ANSWERS)
        shard = shards.setdefault(number, {})
        shard[within] = found
        if len(shard) == min(SHARD_ANSWERS, len(asked) - number * SHARD_ANSWERS):
            whole = [found for _, found in sorted(shards.pop(number).items())]
            write(files[number], whole, origins[number])
            yield whole


def _recipe(asked: Sequence[Asked], how: Mapping[str, Any]) -> str:
    told = {name: sorted(v) if isinstance(v, frozenset) else v for name, v in how.items()}
    return hashlib.sha256(json.dumps([asked, told], sort_keys=True).encode()).hexdigest()[:32]


def check(path: Path, expected: Mapping[str, str]) -> None:
    """Raise ValueError unless a shard was made as ``expected`` says (see `origin`)."""
    with _opened(path) as file:
        told = file.metadata() or {}
    if any(told.get(name) != value for name, value in expected.items()):
        raise ValueError(
            f"answers in {path.parent} are of another model or recipe: give another --work"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, remove it: {error}") from error


def write(path: Path, answers: Sequence[Answer], origin: dict[str, str]) -> None:
    """A shard: the columns of its answers, one after the other. It appears in one piece."""
    scratch = path.with_suffix(".tmp")
    columns = {
        "sizes": torch.tensor([[len(a.tokens), a.num_prompt] for a in answers]),
        "temperature": torch.tensor([a.temperature for a in answers]),
        "tokens": torch.cat([a.tokens for a in answers]).int(),
        "features": torch.cat([a.features for a in answers]),
        "log_mass": torch.cat([a.log_mass for a in answers]).float(),
    }
    save_file(columns, scratch, origin)
    scratch.rename(path)


def read(path: Path) -> list[Answer]:
    """What `write` wrote. Raises ValueError."""
    with _opened(path) as file:
        sizes = file.get_tensor("sizes")
        num_tokens, num_prompt = sizes[:, 0], sizes[:, 1]
        columns = (
            file.get_tensor("tokens").long().split(num_tokens.tolist()),
            num_prompt.tolist(),
            file.get_tensor("temperature").tolist(),
            file.get_tensor("features").split((num_tokens - 1).tolist()),
            file.get_tensor("log_mass").split((num_tokens - 1).tolist()),
        )
    return [Answer(*row) for row in zip(*columns, strict=True)]


def read_prompts(file: Path, tokenizer: Any, max_tokens: int, hot: float) -> list[Asked]:
    """Prompts of a file of JSON lines, each with a text as ``prompt``, in the chat template.

    Every third is to be answered at the temperature ``hot``, the others greedily. What takes more
    than ``max_tokens`` is left out. Raises ValueError.
    """
    found: list[Asked] = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            text = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: expected an object with a prompt") from error
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        tokens = tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template)
        if 0 < len(tokens) <= max_tokens:
            found.append(Asked(tokens, hot if len(found) % 3 == 0 else 0.0))
    if not found:
        raise ValueError(f"{file} holds no prompt of at most {max_tokens} tokens")
    return found
