"""Record what would have been accepted: Spec-Bench's first turns on the reference worker.

A token of the worker's output depends on its context, the seed and the position alone, whatever
was drafted (sampling.py). So each prompt is decoded once, without speculation, and then each
proposer is asked at *every* position of the answer what it would have drafted there: of a step
that begins at position p and drafts k, min(k, run[p]) are accepted, for any k up to `MAX_LENGTH`.
The trace therefore holds every course that decoding could have taken under any lengths.

* Both temperatures of a prompt are decoded in one batch, after one pass over the prompt.
* Prompt lookup is the worker's own (prompt_lookup.py), given the tokens before p.
* The draft model is the default one: the target without five of its thirty layers
  (model.py, DEFAULT_DRAFT_DROP_LAYERS), since no small draft exists for so small a target. While
  its drafts are accepted its context is the answer itself, so one pass over the answer gives its
  token at every position, and run[p] is the number of positions in a row from p at which it
  agrees.

Work goes in parts, each added to benchmarks/data/acceptance.npz (columns: acceptance_traces.py) as
it is done, so that it may be stopped and gone on with. Delete the file to begin anew.

Run: python benchmarks/record_acceptance.py [--budget-s 270]; with --lookups-anew after a change of
prompt_lookup.py, to compute what follows from the tokens alone
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from acceptance_traces import FILE, MAX_LENGTH
from spec_bench import TASKS, Prompt, prompts
from torch import Tensor

from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.draft_tree import DraftTree, agreeing_path
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.prompt_lookup import NgramIndex, PromptLookup
from smartspec.engine_adapter.reference.sampling import Draws, sample
from smartspec.engine_adapter.reference.sequence import Request, SamplingParams
from smartspec.engine_adapter.reference.sequence import Sequence as Decoded

PART = 24  #: prompts, decoded together
SORTED = 72  #: prompts, sorted by length before they are cut into parts: rows are read padded
TEMPERATURES = (0.0, 0.7)
MAX_PROMPT_TOKENS = 1000
MAX_ANSWER_TOKENS = 96
MODEL_LEN = MAX_PROMPT_TOKENS + MAX_ANSWER_TOKENS

KEY = ("question_id", "temperature")  #: columns that tell answers apart
Columns = dict[str, npt.NDArray[Any]]


class Answered(NamedTuple):
    """A request and what the target said."""

    request: Request
    tokens: list[int]
    logprobs: list[float]  #: of each token, natural, at temperature 1


class Recorder:
    """Decodes and asks the proposers.

    Parameters
    ----------
    target, draft : models of one vocabulary
    eos_token_ids : tokens that end an answer
    """

    def __init__(self, target: Any, draft: Any, eos_token_ids: frozenset[int]) -> None:
        limit = min(MODEL_LEN, target.config.max_position_embeddings)
        self.target = ModelRunner(target, PART * len(TEMPERATURES), limit)
        self.draft = ModelRunner(draft, 1, limit)
        self.eos_token_ids = eos_token_ids

    def record(self, asked: Sequence[Request]) -> list[Columns]:
        """The columns of each request, position by position after the answer's first token.

        A request that has the prompt of the one before it shares its pass over the prompt.
        """
        found = []
        prompt: list[int] = []
        for request, tokens, logprobs in self._decode(asked):
            if request.prompt != prompt:
                prompt = request.prompt
                self.draft.forward([Segment(0, 0, prompt, 0)])
            draft, confidence = self._draft_runs(request, tokens)
            found.append(
                {
                    "first_token": np.array(tokens[:1], np.uint16),
                    "token": np.array(tokens[1:], np.uint16),
                    "target_logprob": np.array(logprobs[1:], np.float16),
                    "draft_run": draft,
                    "draft_confidence": confidence.astype(np.float16),
                }
                | lookups(prompt, tokens)
            )
        return found

    @torch.inference_mode()
    def _decode(self, asked: Sequence[Request]) -> list[Answered]:
        """Each request's answer, a cache row each, one token a pass."""
        found: list[Answered] = []
        for row, request in enumerate(asked):
            prompt = request.prompt
            if row and prompt == asked[row - 1].prompt:
                self.target.cache.move(row - 1, row, len(prompt))
            else:
                logits = self.target.forward([Segment(row, 0, prompt, 1)])
            found.append(Answered(request, [], []))
            self._draw(logits, found[-1:])
        while alive := [row for row, answered in enumerate(found) if self._goes_on(answered)]:
            segments = [
                Segment(row, len(request.prompt) + len(tokens) - 1, tokens[-1:], 1)
                for row in alive
                for request, tokens, _ in (found[row],)
            ]
            self._draw(self.target.forward(segments), [found[row] for row in alive])
        return found

    def _goes_on(self, answered: Answered) -> bool:
        tokens = answered.tokens
        room = len(tokens) < (answered.request.max_tokens or MAX_ANSWER_TOKENS)
        return room and tokens[-1] not in self.eos_token_ids

    def _draw(self, logits: Tensor, answers: Sequence[Answered]) -> None:
        """Add the next token of each, from its row of ``logits`` [M, V]."""
        draws = Draws.of(
            (request.sampling, request.sampling.seed or 0, range(place, place + 1))
            for request, tokens, _ in answers
            for place in (len(request.prompt) + len(tokens),)
        )
        drawn = sample(logits, draws).tolist()
        scores = logits.log_softmax(-1)[range(len(drawn)), drawn].tolist()
        for answered, token, score in zip(answers, drawn, scores, strict=True):
            answered.tokens.append(token)
            answered.logprobs.append(score)

    @torch.inference_mode()
    def _draft_runs(
        self, request: Request, answer: list[int]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
        """Drafts in a row that agree, and the probability that the draft gives its own token.

        The prompt is in the draft model's cache.
        """
        count = len(answer) - 1
        if count <= 0:
            return np.zeros(0, np.uint8), np.zeros(0, np.float16)
        begin = len(request.prompt)
        logits = self.draft.forward([Segment(0, begin, answer[:-1], count)])
        places = range(begin + 1, begin + 1 + count)
        drawn = sample(logits, Draws.of([(request.sampling, request.sampling.seed or 0, places)]))
        chance = logits.float().softmax(-1).gather(-1, drawn[:, None])[:, 0]
        agrees = [a == b for a, b in zip(drawn.tolist(), answer[1:], strict=True)]
        runs = np.zeros(count, np.uint8)
        run = 0
        for p in range(count - 1, -1, -1):
            run = min(run + 1, MAX_LENGTH) if agrees[p] else 0
            runs[p] = run
        return runs, chance.cpu().numpy()


def lookups(prompt: list[int], answer: list[int]) -> Columns:
    """What prompt lookup knows and proposes at each position (acceptance_traces.py).

    A function of the tokens alone.
    """
    lookup = PromptLookup(MAX_LENGTH)
    index = NgramIndex(lookup.min_ngram, lookup.max_ngram)
    sequence = Decoded(0, Request(prompt), len(answer) + 1, 0, 0.0)
    wanted = np.array([MAX_LENGTH])
    length, agreement, runs, misses, seconds = [], [], [], [], []
    for p in range(1, len(answer)):
        sequence.tokens = prompt + answer[:p]
        match = index.find(sequence.tokens)
        able = lookup.available([sequence]).ceiling[0]
        rest = answer[p : p + MAX_LENGTH]
        drafts = lookup.propose([sequence], wanted).drafts[0].tokens if able else []
        seconds.append(drafts[1] if able else 0)
        drafts = drafts[: len(rest)]
        run = len(agreeing_path(DraftTree.chain(drafts), [*rest, -1]))
        length.append(match.length)
        agreement.append(match.agreement)
        runs.append(run)
        misses.append(drafts[run] if run < len(drafts) else 0)
    return {
        "match_length": np.array(length, np.uint8),
        "match_agreement": np.array(agreement, np.float16),
        "lookup_run": np.array(runs, np.uint8),
        "lookup_miss": np.array(misses, np.uint16),
        "lookup_second": np.array(seconds, np.uint16),
    }


def ask(prompt: Prompt, tokenizer: Any, temperature: float) -> Request:
    """A prompt as the worker's chat would send it, cut to `MAX_PROMPT_TOKENS`."""
    ids = tokenizer.encode(prompt.text, add_special_tokens=False)
    room = MAX_PROMPT_TOKENS - 48  # for the template's own
    text = prompt.text if len(ids) <= room else tokenizer.decode(ids[:room])
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return Request(
        tokenizer.encode(whole, add_special_tokens=False),
        max_tokens=MAX_ANSWER_TOKENS,
        sampling=SamplingParams(temperature=temperature, seed=prompt.question_id),
    )


def read() -> Columns:
    """Everything recorded so far; empty when there is nothing."""
    if not FILE.exists():
        return {}
    with np.load(FILE) as file:
        return {name: file[name] for name in file.files}


def add(part: Columns) -> int:
    """Put a part behind what is there; the file is whole at any time. Returns its answers."""
    before = read()
    joined = {name: np.concatenate([before.get(name, part[name][:0]), part[name]]) for name in part}
    write(joined)
    return len(joined["question_id"])


def write(columns: Columns) -> None:
    """Replace the file in one piece."""
    FILE.parent.mkdir(exist_ok=True)
    new = FILE.with_suffix(".new.npz")
    np.savez_compressed(new, allow_pickle=False, **columns)
    new.replace(FILE)


def look_up_anew(tokenizer: Any) -> None:
    """Compute the columns of `lookups` again for all that is recorded."""
    columns = read()
    by_id = {prompt.question_id: ask(prompt, tokenizer, 0.0).prompt for prompt in prompts()}
    ends = np.cumsum(columns["num_positions"].astype(np.int64))[:-1]
    found = [
        lookups(by_id[question], [first, *later.tolist()])
        for question, first, later in zip(
            columns["question_id"].tolist(),
            columns["first_token"].tolist(),
            np.split(columns["token"], ends),
            strict=True,
        )
    ]
    write(columns | {name: np.concatenate([one[name] for one in found]) for name in found[0]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=480, help="prompts, balanced over tasks")
    parser.add_argument("--budget-s", type=float, default=270.0, help="no new part after this")
    parser.add_argument("--lookups-anew", action="store_true", help="decode nothing; see there")
    arguments = parser.parse_args()
    begin = time.monotonic()
    loaded = models.load(device="cpu")
    if arguments.lookups_anew:
        look_up_anew(loaded.tokenizer)
        return
    thin = models.without_layers(loaded.model, models.DEFAULT_DRAFT_DROP_LAYERS)
    recorder = Recorder(loaded.model, thin, loaded.eos_token_ids)
    before = read()
    done = set(zip(*(before.get(name, np.empty(0)).tolist() for name in KEY), strict=True))
    left = [
        prompt
        for prompt in prompts()[: arguments.limit]
        if any((prompt.question_id, float(np.float32(t))) not in done for t in TEMPERATURES)
    ]
    parts: list[list[Prompt]] = []
    for first in range(0, len(left), SORTED):
        some = sorted(left[first : first + SORTED], key=lambda prompt: len(prompt.text))
        parts += [some[i : i + PART] for i in range(0, len(some), PART)]
    for number, some in enumerate(parts):
        if time.monotonic() - begin > arguments.budget_s:
            print(f"out of time with {len(parts) - number} parts left: run again to go on")
            break
        chosen = [
            (prompt, temperature)
            for prompt in some
            for temperature in TEMPERATURES
            if (prompt.question_id, float(np.float32(temperature))) not in done
        ]
        requests = [ask(prompt, loaded.tokenizer, temperature) for prompt, temperature in chosen]
        columns = recorder.record(requests)
        num_answers = add(
            {
                "question_id": np.array([p.question_id for p, _ in chosen], np.uint16),
                "task": np.array([TASKS.index(p.task) for p, _ in chosen], np.uint8),
                "temperature": np.array([t for _, t in chosen], np.float32),
                "num_prompt": np.array([len(request.prompt) for request in requests], np.uint16),
                "num_positions": np.array([len(c["token"]) for c in columns], np.uint16),
            }
            | {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
        )
        print(f"{num_answers} answers after {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
