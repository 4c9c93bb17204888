"""Record what would have been accepted: Spec-Bench's first turns on the reference worker.

A token of the worker's output depends on its context, the seed and the position alone, whatever
was drafted (sampling.py). So each prompt is decoded once, without speculation, and then each
proposer is asked at *every* position of the answer what it would have drafted there: of a step
that begins at position p and drafts k, min(k, run[p]) are accepted, for any k up to `MAX_LENGTH`.
The trace therefore holds every course that decoding could have taken under any lengths.

* Prompt lookup is the worker's own (prompt_lookup.py), given the tokens before p.
* The draft model is the default one: the target without five of its thirty layers
  (model.py, DEFAULT_DRAFT_DROP_LAYERS), since no small draft exists for so small a target. While
  its drafts are accepted its context is the answer itself, so one pass over the answer gives its
  token at every position, and run[p] is the number of positions in a row from p at which it
  agrees.

Work goes in parts, each added to benchmarks/data/acceptance.npz (columns: acceptance_traces.py) as
it is done, so that it may be stopped and gone on with. Delete the file to begin anew.

Run: python benchmarks/record_acceptance.py --temperature 0 --limit 240 [--budget-s 270]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from acceptance_traces import FILE, MAX_LENGTH
from spec_bench import TASKS, Prompt, prompts

from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.draft_tree import DraftTree, agreeing_path
from smartspec.engine_adapter.reference.events import Finished, Tokens
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.sampling import Draws, sample
from smartspec.engine_adapter.reference.sequence import Request, SamplingParams, Sequence
from smartspec.engine_adapter.reference.worker import Worker

PART = 12  #: prompts, decoded together
MAX_PROMPT_TOKENS = 1000
MAX_ANSWER_TOKENS = 96
MODEL_LEN = MAX_PROMPT_TOKENS + MAX_ANSWER_TOKENS

Columns = dict[str, npt.NDArray[Any]]


class Recorder:
    """Decodes and asks the proposers.

    Parameters
    ----------
    target, draft : models of one vocabulary
    eos_token_ids : tokens that end an answer
    """

    def __init__(self, target: Any, draft: Any, eos_token_ids: frozenset[int]) -> None:
        limit = min(MODEL_LEN, target.config.max_position_embeddings)
        self.worker = Worker(
            target,
            max_num_running=PART,
            max_model_len=limit,
            max_prefill_tokens=512,
            eos_token_ids=eos_token_ids,
        )
        self.draft = ModelRunner(draft, 1, limit)

    def record(self, asked: list[Request]) -> list[Columns]:
        """The columns of each request, position by position after the answer's first token."""
        order = {self.worker.add_request(request): i for i, request in enumerate(asked)}
        answers: list[list[int]] = [[] for _ in asked]
        scores: list[list[float]] = [[] for _ in asked]
        while self.worker.has_work:
            for event in self.worker.step().events:
                if isinstance(event, Tokens):
                    scores[order[event.id]] += [t.logprob for t in event.logprobs or ()]
                elif isinstance(event, Finished):
                    answers[order[event.id]] = event.tokens
        return [
            self._columns(request, answer, score)
            for request, answer, score in zip(asked, answers, scores, strict=True)
        ]

    def _columns(self, request: Request, answer: list[int], scores: list[float]) -> Columns:
        match, lookup = lookup_runs(request.prompt, answer)
        draft, confidence = self._draft_runs(request, answer)
        return {
            "token": np.array(answer[1:], np.uint16),
            "target_logprob": np.array(scores[1:], np.float16),
            "match_length": match,
            "lookup_run": lookup,
            "draft_run": draft,
            "draft_confidence": confidence.astype(np.float16),
        }

    @torch.inference_mode()
    def _draft_runs(
        self, request: Request, answer: list[int]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
        """Drafts in a row that agree, and the probability that the draft gives its own token."""
        count = len(answer) - 1
        if count <= 0:
            return np.zeros(0, np.uint8), np.zeros(0, np.float16)
        tokens = request.prompt + answer[:-1]
        logits = self.draft.forward([Segment(0, 0, tokens, count)])
        first = len(request.prompt) + 1
        seed = request.sampling.seed
        assert seed is not None
        places = range(first, first + count)
        drawn = sample(logits, Draws.of([(request.sampling, seed % 2**64, places)]))
        chance = logits.float().softmax(-1).gather(-1, drawn[:, None])[:, 0]
        agrees = [a == b for a, b in zip(drawn.tolist(), answer[1:], strict=True)]
        runs = np.zeros(count, np.uint8)
        run = 0
        for p in range(count - 1, -1, -1):
            run = min(run + 1, MAX_LENGTH) if agrees[p] else 0
            runs[p] = run
        return runs, chance.cpu().numpy()


def lookup_runs(
    prompt: list[int], answer: list[int]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Tokens matched, and copied tokens in a row that agree, after the answer's first token."""
    lookup = PromptLookup(MAX_LENGTH)
    sequence = Sequence(0, Request(prompt), len(answer) + 1, 0, 0.0)
    match, runs = [], []
    wanted = np.array([MAX_LENGTH])
    for p in range(1, len(answer)):
        sequence.tokens = prompt + answer[:p]
        length = int(lookup.available([sequence]).features[0, 0])
        drafts = lookup.propose([sequence], wanted).drafts[0].tokens if length else []
        rest = answer[p : p + MAX_LENGTH]
        match.append(length)
        runs.append(len(agreeing_path(DraftTree.chain(drafts[: len(rest)]), [*rest, -1])))
    return np.array(match, np.uint8), np.array(runs, np.uint8)


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
        num_logprobs=0,
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
    FILE.parent.mkdir(exist_ok=True)
    new = FILE.with_suffix(".new.npz")
    np.savez_compressed(new, **joined)
    new.replace(FILE)
    return len(joined["question_id"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--limit", type=int, default=480, help="prompts, balanced over tasks")
    parser.add_argument("--budget-s", type=float, default=270.0, help="no new part after this")
    arguments = parser.parse_args()
    chosen = prompts()[: arguments.limit]
    begin = time.monotonic()
    loaded = models.load(device="cpu")
    thin = models.without_layers(loaded.model, models.DEFAULT_DRAFT_DROP_LAYERS)
    recorder = Recorder(loaded.model, thin, loaded.eos_token_ids)
    before = read()
    done: set[int] = set()
    if before:
        same = before["temperature"] == np.float32(arguments.temperature)
        done.update(before["question_id"][same].tolist())
    left = [prompt for prompt in chosen if prompt.question_id not in done]
    while left:
        if time.monotonic() - begin > arguments.budget_s:
            print(f"out of time with {len(left)} prompts left: run again to go on")
            break
        some, left = left[:PART], left[PART:]
        requests = [ask(prompt, loaded.tokenizer, arguments.temperature) for prompt in some]
        columns = recorder.record(requests)
        num_answers = add(
            {
                "question_id": np.array([prompt.question_id for prompt in some], np.uint16),
                "task": np.array([TASKS.index(prompt.task) for prompt in some], np.uint8),
                "temperature": np.full(len(some), arguments.temperature, np.float32),
                "num_prompt": np.array([len(request.prompt) for request in requests], np.uint16),
                "num_positions": np.array([len(c["token"]) for c in columns], np.uint16),
            }
            | {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
        )
        print(f"{num_answers} answers after {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
