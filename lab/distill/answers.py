"""The target's own answers, to prompts that are given or that it makes up itself.

A drafter has to foresee what *this* target says, so it learns from nothing else: on-policy data,
after DistillSpec (Zhou et al. 2024). Prompts of its own are what a chat model says when it is
given the beginning of a user's turn ("Magpie", Xu et al. 2024).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from smartspec.engine_adapter.reference.feature_head import fingerprint
from smartspec.engine_adapter.reference.model_runner import ModelRunner

SHARD_ANSWERS = 128
POOL_PROMPTS = 4096  #: of which those of like lengths are answered together
PREFILL_TOKENS = 1 << 14  #: of prompts taken in together, with what fills them up to one length
TAKING_IN = 8  #: one of so many rows is for prompts that are taken in
CHECK_STEPS = 16  #: after so many steps it is looked who is done, and others begin
CONTEXT_STEP = 64  #: rows are read up to a multiple of it
FORMAT = "answers-3"
#: An answer that goes round in circles of up to so many tokens, for so many, has no more to teach.
LONGEST_LOOP = 32
LOOP_TOKENS = 96
RUN_WORDS = 8  #: in a row, that tell that a text is taken from another
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  #: stands for what a user says, in a chat template


class Asked(NamedTuple):
    """A prompt."""

    tokens: list[int]
    temperature: float


class Answer(NamedTuple):
    """A prompt and its answer, T tokens together."""

    tokens: Tensor  #: [T] int64
    num_prompt: int
    temperature: float


class _Rows:
    """Answers in the making: a row of the cache each; the last rows are for prompts taken in.

    Every row takes a token in every step, also those that have nothing to say: so nothing is done
    by Python for any single one, and an accelerator may have thousands.
    """

    def __init__(self, runner: ModelRunner, eos_token_ids: frozenset[int], seed: int) -> None:
        self._runner = runner
        num_rows, width, device = runner.cache.num_rows, runner.cache.max_model_len, runner.device
        self._taking_in = max(1, num_rows // TAKING_IN)
        size = num_rows - self._taking_in
        self.free = list(range(size))
        self.asked: dict[int, tuple[int, Asked]] = {}  #: by row, with its place
        self._tokens = torch.zeros(size, width, dtype=torch.long, device=device)
        self._last = torch.zeros(size, dtype=torch.long, device=device)  # slot of the latest token
        self._begin = torch.zeros_like(self._last)  # slot of the first answer token
        self._temperature = torch.zeros(size, device=device)
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._longest = 0  # slot of any row's latest token, at most

    def fill(self, waiting: list[tuple[int, Asked]]) -> None:
        """Take in prompts from the end of ``waiting`` as long as there are rows."""
        while waiting and self.free:
            count = min(len(self.free), len(waiting), self._taking_in)
            longest = max(len(prompt.tokens) for _, prompt in waiting[-count:])
            count = min(count, max(1, PREFILL_TOKENS // longest))
            self._take_in([waiting.pop() for _ in range(count)])

    def _take_in(self, asked: Sequence[tuple[int, Asked]]) -> None:
        rows = [self.free.pop() for _ in asked]
        self.asked |= zip(rows, asked, strict=True)
        device = self._tokens.device
        at = torch.tensor(rows, device=device)
        sizes = torch.tensor([len(prompt.tokens) for _, prompt in asked], device=device)
        width = int(sizes.max())
        filled = [prompt.tokens + [0] * (width - len(prompt.tokens)) for _, prompt in asked]
        tokens = torch.tensor(filled, device=device)
        ends = torch.arange(len(rows), device=device) * width + sizes - 1
        slots = torch.arange(width, device=device).expand_as(tokens)
        first = len(self._tokens)
        logits = self._runner.forward_rows(first, tokens, slots, ends, width)
        self._runner.cache.move(slice(first, first + len(rows)), at, width)
        self._temperature[at] = torch.tensor([p.temperature for _, p in asked], device=device)
        self._tokens[at, :width] = tokens
        self._tokens[at, sizes] = self._draw(logits, self._temperature[at])
        self._begin[at] = self._last[at] = sizes
        self._longest = max(self._longest, width)

    def step(self) -> None:
        """One token more for every row."""
        slots = self._last[:, None]
        wide = -(-(self._longest + 1) // CONTEXT_STEP) * CONTEXT_STEP
        logits = self._runner.forward_rows(
            0,
            self._tokens.gather(1, slots),
            slots,
            torch.arange(len(self._last), device=self._last.device),
            min(wide, self._tokens.shape[1]),
        )
        self._last = (self._last + 1).clamp_(max=self._tokens.shape[1] - 1)
        self._tokens.scatter_(
            1, self._last[:, None], self._draw(logits, self._temperature)[:, None]
        )
        self._longest = min(self._longest + 1, self._tokens.shape[1] - 1)

    def _draw(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """The largest logit with Gumbel's noise: a draw from the softmax, greedy at 0; [rows]."""
        drawn = logits.argmax(-1)
        hot = temperature.nonzero()[:, 0]
        noise = torch.empty(len(hot), logits.shape[1], device=logits.device)
        noise.exponential_(generator=self._generator).log_().mul_(temperature[hot, None])
        drawn[hot] = (logits[hot] - noise).argmax(-1)
        return drawn

    def done(self, max_answer_tokens: int) -> Iterator[tuple[int, Answer]]:
        """Answers that have come to an end, with their places; their rows are free again."""
        tokens, last, begin = self._tokens.cpu(), self._last.cpu(), self._begin.cpu()
        places = torch.arange(tokens.shape[1])
        over = torch.isin(tokens, self._eos.cpu()) & (places >= begin[:, None])
        over |= places >= begin[:, None] + max_answer_tokens - 1
        over |= (places == last[:, None]) & loops(tokens, begin, last)[:, None]
        end = over.long().argmax(1)
        for row in (end <= last).nonzero()[:, 0].tolist():
            if row in self.asked:
                place, asked = self.asked.pop(row)
                text = tokens[row, : int(end[row]) + 1].clone()
                yield place, Answer(text, len(asked.tokens), asked.temperature)
                self.free.append(row)
        idle = torch.tensor(self.free, dtype=torch.long, device=self._last.device)
        self._last[idle] = 0
        self._longest = int(self._last.max())


def loops(tokens: Tensor, begin: Tensor, last: Tensor) -> Tensor:
    """Which answers [R], from ``begin`` to ``last`` of ``tokens`` [R, W], go round in circles."""
    places = last[:, None] + torch.arange(1 - LOOP_TOKENS, 1)
    late = tokens.gather(1, places.clamp(min=0))
    same = [(late[:, n:] == late[:, :-n]).all(-1) for n in range(1, LONGEST_LOOP + 1)]
    return torch.stack(same).any(0) & (places[:, 0] >= begin)


def answer(
    runner: ModelRunner,
    asked: Sequence[Asked],
    eos_token_ids: frozenset[int],
    max_answer_tokens: int,
    seed: int = 0,
    until: float = math.inf,
) -> Iterator[tuple[int, Answer]]:
    """Answers, with the places of their prompts, in the order in which they are done.

    Many are decoded together, as the runner has rows: those of like lengths should be neighbours.

    Parameters
    ----------
    runner : with `CHECK_STEPS` more tokens of room than prompt and answer take
    until : of `time.monotonic`; later no prompt is begun

    Raises ValueError where a prompt has no room.
    """
    longest = max((len(prompt.tokens) for prompt in asked), default=0)
    if longest + max_answer_tokens + CHECK_STEPS > runner.cache.max_model_len:
        raise ValueError(f"a prompt of {longest} tokens has no room for its answer")
    rows = _Rows(runner, eos_token_ids, seed)
    waiting = list(enumerate(asked))[::-1]
    while waiting or rows.asked:
        rows.fill(waiting)
        for _ in range(CHECK_STEPS):
            rows.step()
        yield from rows.done(max_answer_tokens)
        if time.monotonic() > until:
            waiting.clear()


def origin(target: PreTrainedModel) -> dict[str, str]:
    """What all answers that a drafter learns from must share; written into each shard."""
    return {"format": FORMAT, "target": fingerprint(target)}


def record(
    folder: Path,
    runner: ModelRunner,
    asked: Sequence[Asked],
    until: float = math.inf,
    **how: Any,
) -> Iterator[list[Answer]]:
    """Answer prompts into a folder of shards; what is there already is not asked again.

    ``until``, ``how`` : as of `answer`. Yields what is new of each shard when it is written. Raises
    ValueError where a shard is there that was made in another way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = _pooled(asked)
    begins = range(0, len(asked), SHARD_ANSWERS)
    files = [folder / f"{begin:06}.safetensors" for begin in begins]
    common = origin(runner.model)
    origins = [{**common, "recipe": _recipe(asked[i : i + SHARD_ANSWERS], how)} for i in begins]
    for file, expected in zip(files, origins, strict=True):
        if file.exists():
            check(file, expected)
    shards = [_placed(file) if file.exists() else {} for file in files]
    todo = [i for i in range(len(asked)) if i % SHARD_ANSWERS not in shards[i // SHARD_ANSWERS]]
    new: dict[int, list[Answer]] = {}

    def finished(number: int) -> list[Answer]:
        write(files[number], shards[number], origins[number])
        return new.pop(number)

    for place, found in answer(runner, [asked[i] for i in todo], until=until, **how):
        number, within = divmod(todo[place], SHARD_ANSWERS)
        shards[number][within] = found
        new.setdefault(number, []).append(found)
        if len(shards[number]) == min(SHARD_ANSWERS, len(asked) - number * SHARD_ANSWERS):
            yield finished(number)
    for number in list(new):  # time was up: the rest is asked when it is gone on with
        yield finished(number)


def _pooled(asked: Sequence[Asked]) -> list[Asked]:
    """Those of like lengths are neighbours, within a pool: rows are read up to the longest."""
    pools = (asked[i : i + POOL_PROMPTS] for i in range(0, len(asked), POOL_PROMPTS))
    return [one for pool in pools for one in sorted(pool, key=lambda one: len(one.tokens))]


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


def write(path: Path, answers: Mapping[int, Answer], origin: dict[str, str]) -> None:
    """A shard: the columns of answers, by their places in it. It appears in one piece."""
    scratch = path.with_suffix(".tmp")
    places = sorted(answers)
    found = [answers[place] for place in places]
    columns = {
        "places": torch.tensor(places),
        "sizes": torch.tensor([[len(a.tokens), a.num_prompt] for a in found]),
        "temperature": torch.tensor([a.temperature for a in found]),
        "tokens": torch.cat([a.tokens for a in found]).int(),
    }
    save_file(columns, scratch, origin)
    scratch.rename(path)


def _placed(path: Path) -> dict[int, Answer]:
    """What `write` wrote. Raises ValueError."""
    with _opened(path) as file:
        num_tokens, num_prompt = file.get_tensor("sizes").T.tolist()
        tokens = file.get_tensor("tokens").long().split(num_tokens)
        temperature = file.get_tensor("temperature").tolist()
        places = file.get_tensor("places").tolist()
    found = [Answer(*row) for row in zip(tokens, num_prompt, temperature, strict=True)]
    return dict(zip(places, found, strict=True))


def read(path: Path) -> list[Answer]:
    """The answers of a shard. Raises ValueError."""
    return list(_placed(path).values())


def _objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of a file of JSON lines, each with where it stands. Raises ValueError."""
    # A text may hold other separators, at which splitlines() would cut it.
    for number, line in enumerate(file.read_text().split("\n"), 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        if not isinstance(told, dict):
            raise ValueError(f"{file}, line {number}: expected an object")
        yield f"{file}, line {number}", told


def read_prompts(file: Path) -> list[str]:
    """Of a file of JSON lines, each with a text as ``prompt``. Raises ValueError."""
    found = []
    for where, told in _objects(file):
        if not isinstance(told.get("prompt"), str):
            raise ValueError(f"{where}: expected an object with a prompt")
        found.append(told["prompt"])
    return found


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    """All that a text has of `RUN_WORDS` words in a row; of a shorter one, all its words."""
    words = text.lower().split()
    return {tuple(words[i : i + RUN_WORDS]) for i in range(max(1, len(words) - RUN_WORDS + 1))}


def unlike(texts: Sequence[str], file: Path) -> list[str]:
    """Texts that share no run of words with any text in a file of JSON lines."""
    avoided: set[tuple[str, ...]] = set()
    for _, told in _objects(file):
        for value in told.values():
            for text in value if isinstance(value, list) else [value]:
                avoided |= runs_of_words(str(text))
    return [text for text in texts if not runs_of_words(text) & avoided]


def in_template(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> list[list[int]]:
    """Tokens of prompts, in the chat template if there is one; those with too many are left out."""
    whole = (_turn(text, tokenizer) for text in texts)
    plain = not tokenizer.chat_template
    found = [tokenizer.encode(text, add_special_tokens=plain) for text in whole]
    return [tokens for tokens in found if 0 < len(tokens) <= max_tokens]


def _turn(text: str, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return text
    told = [{"role": "user", "content": text}]
    turn: str = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    return turn


def around_user(tokenizer: Any) -> tuple[list[int], str]:
    """What comes before a user's words, and what after. Raises ValueError where nothing does."""
    before, mark, after = _turn(MARK, tokenizer).partition(MARK)
    if not (before and mark):
        raise ValueError("prompts of its own take a model with a chat template: give a file")
    tokens: list[int] = tokenizer.encode(before, add_special_tokens=False)
    return tokens, after.strip()


def as_prompt(answer: Answer, tokenizer: Any, after: str, eos: frozenset[int]) -> str:
    """What was said in a user's place; empty: it did not come to an end.

    ``after`` : what follows a user's words in the template, where that is no end of a text
    """
    said = answer.tokens[answer.num_prompt :].tolist()
    text: str = tokenizer.decode(said, skip_special_tokens=True)
    words, turned, _ = text.partition(after) if after else (text, "", "")
    return words.strip() if turned or said[-1] in eos else ""
