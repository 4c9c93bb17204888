"""The worker as a process: JSON lines in, JSON lines out.

In: commands.py. Out: replies.py. End of input is like ``stop``: what was submitted is finished
first. A line that cannot be understood is answered with ``error`` and harms nothing else.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, BinaryIO, Protocol, TypeAlias

import msgspec
import numpy as np

from smartspec.engine_adapter.base import FixedLength, LengthSource
from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.reference import commands, replies
from smartspec.engine_adapter.reference.commands import Mode
from smartspec.engine_adapter.reference.events import (
    Finished,
    Refused,
    StepOutput,
    TokenLogprobs,
    Tokens,
)
from smartspec.engine_adapter.reference.pieces import Pieces
from smartspec.engine_adapter.reference.replies import Ready
from smartspec.engine_adapter.reference.sequence import Request, SamplingParams
from smartspec.engine_adapter.reference.worker import Worker


class Link(LengthSource, Protocol):
    """A length source that somebody else steers, over a connection (EngineLink)."""

    def idle(self) -> None:
        """Keep in touch while there is nothing to decode."""


LinkFactory: TypeAlias = Callable[[Ready], Link]

IDLE_S = 0.1  #: between signs of life while there is nothing to decode


class LineServer:
    """Feeds a worker from a stream of lines, and writes down what it says.

    Parameters
    ----------
    worker : the decode loop
    tokenizer : for prompts
    facts : of the worker: said first, and told to the daemon's link
    link_factory : makes the ``smartspec`` length source, at first use; None: there is none
    sink : where events go, in one write per step; it is allowed to block
    step_events : whether to write a ``step`` event per step
    clock : seconds, monotonic
    """

    def __init__(
        self,
        worker: Worker,
        tokenizer: Any,
        facts: Ready,
        sink: BinaryIO,
        link_factory: LinkFactory | None = None,
        step_events: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._worker = worker
        self._tokenizer = tokenizer
        self._pieces = Pieces(tokenizer)
        self._facts = facts
        self._sink = sink
        self._link_factory = link_factory
        self._link: Link | None = None
        self._step_events = step_events
        self._clock = clock
        self._start_s = clock()
        self._mode: Mode = "own"
        self._numbers: dict[str, int] = {}  # of requests in the worker, by their id outside
        self._ids: dict[int, str] = {}
        self._totals = {
            "num_steps": 0,
            "num_tokens": 0,
            "num_drafts": 0,
            "num_drafted": 0,
            "num_accepted": 0,
        }
        # Place j: drafts of which j were accepted (a length fits in a byte).
        self._num_by_accepted = np.zeros(256, np.int64)
        self._busy_s = 0.0
        self._held = False
        self._stopping = False
        self._out: list[bytes] = []

    def run(self, source: BinaryIO) -> None:
        """Serve until ``stop`` or the end of ``source``, and until everything is finished."""
        lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(source, lines), daemon=True).start()
        self._say(self._facts)
        self._flush()
        try:
            while not self._stopping or self._worker.has_work:
                # Wait only when there is nothing to decode.
                idle = not self._decodes and not self._stopping
                line = _next(lines, self._patience_s if idle else 0.0)
                while line is not _NOTHING:
                    self.handle(line)
                    line = _next(lines, 0.0)
                if idle and self._link is not None:
                    self._link.idle()
                if self._decodes:
                    self._tell(self._worker.step())
                self._flush()
        finally:
            if self._link is not None:
                self._link.close()
        self._say(replies.Stopped())
        self._flush()

    @property
    def _patience_s(self) -> float | None:
        """How long to wait for a line; nobody needs a sign of life where there is no link."""
        return None if self._link is None else IDLE_S

    @property
    def _decodes(self) -> bool:
        return self._worker.has_work and (not self._held or self._stopping)

    def handle(self, line: bytes | None) -> None:
        """Obey one line; None is the end of input."""
        if line is None:
            self._stopping = True
            return
        if not line.strip():
            return
        request_id: str | None = None
        try:
            match commands.decode(line):
                case commands.Submit() as submit:
                    request_id = submit.id
                    self._submit(submit)
                case commands.Cancel(id=name):
                    request_id = name
                    if not self._worker.cancel(self._numbers.get(name, 0)):
                        self._error("no such request is running or waiting", request_id)
                case commands.Speculation(mode=mode, length=length):
                    self.switch(mode, length)
                case commands.Hold():
                    self._held = True
                    self._say(replies.Held(self._now()))
                case commands.Resume():
                    self._held = False
                case commands.Stats():
                    self._say(self._stats())
                case commands.Stop():
                    self._stopping = True
        # Text that the tokenizer or a chat template refuses can raise anything.
        except Exception as error:
            self._error(f"{type(error).__name__}: {error}", request_id)

    def _submit(self, submit: commands.Submit) -> None:
        if self._stopping:
            raise ValueError("stopping: no further requests are taken")
        if submit.id in self._numbers:
            raise ValueError("this id is in use")
        given = (submit.messages, submit.prompt, submit.prompt_token_ids)
        if sum(one is not None for one in given) != 1:
            raise ValueError("give either messages or prompt or prompt_token_ids")
        if submit.prompt_token_ids is not None:
            prompt = submit.prompt_token_ids
        elif submit.messages is not None:
            text = self._tokenizer.apply_chat_template(
                msgspec.to_builtins(submit.messages), tokenize=False, add_generation_prompt=True
            )
            prompt = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            prompt = self._tokenizer(submit.prompt)["input_ids"]
        number = self._worker.add_request(
            Request(
                prompt=list(prompt),
                max_tokens=submit.max_tokens,
                stop=tuple(submit.stop),
                sampling=SamplingParams(
                    submit.temperature, submit.top_p, submit.top_k, submit.seed
                ),
                weight=submit.weight,
                floor=submit.floor,
                max_speculation_length=submit.max_speculation_length,
                ignore_eos=submit.ignore_eos,
                token_time_target_s=submit.token_time_target_s,
                num_logprobs=submit.logprobs,
            )
        )
        self._numbers[submit.id] = number
        self._ids[number] = submit.id

    def switch(self, mode: Mode, length: int | None = None) -> None:
        """Set the length source for the steps to come. Raises ValueError."""
        if (mode == "static") != (length is not None):
            raise ValueError("length goes with mode static, and only with it")
        if mode == "smartspec":
            if self._link is None:
                if self._link_factory is None:
                    raise ValueError("this worker was started without a daemon's address")
                self._link = self._link_factory(self._facts)
            self._worker.length_source = self._link
        else:
            self._worker.length_source = FixedLength(
                self._facts.own_length if length is None else length
            )
        self._mode = mode

    def _tell(self, output: StepOutput) -> None:
        now = self._now()
        for event in output.events:
            name = self._ids[event.id]
            match event:
                case Tokens():
                    self._totals["num_tokens"] += len(event.tokens)
                    scored = None if event.logprobs is None else self._scored(event.logprobs)
                    self._say(replies.Token(name, event.text, event.num_tokens, now, scored))
                case Finished():
                    self._say(
                        replies.Finished(
                            id=name,
                            reason=event.reason,
                            num_tokens=len(event.tokens),
                            num_drafted=event.num_drafted,
                            num_accepted=event.num_accepted,
                            time_to_first_token_s=event.time_to_first_token_s,
                            latency_s=event.latency_s,
                            t_s=now,
                            token_time_s=event.token_time_s,
                        )
                    )
                    self._drop(name)
                case Refused():
                    self._error(event.message, name)
                    self._drop(name)
        if (facts := output.facts) is None:
            return
        self._totals["num_steps"] += 1
        drafted = facts.num_drafted > 0
        self._totals["num_drafts"] += int(drafted.sum())
        self._num_by_accepted += np.bincount(facts.num_accepted[drafted], minlength=256)
        self._totals["num_drafted"] += int(facts.num_drafted.sum())
        self._totals["num_accepted"] += int(facts.num_accepted.sum())
        self._busy_s += facts.step_s
        if self._step_events and output.lengths is not None:
            self._say(
                replies.Step(
                    t_s=now,
                    num_running=self._worker.num_running,
                    num_waiting=facts.num_waiting,
                    num_prefill_tokens=facts.batch.num_prefill_tokens,
                    lengths=output.lengths.tolist(),
                    num_drafted=facts.num_drafted.tolist(),
                    num_accepted=facts.num_accepted.tolist(),
                    source=output.source,
                    step_s=facts.step_s,
                    target_s=facts.target_s,
                    draft_s=facts.draft_s,
                )
            )

    def _scored(self, logprobs: list[TokenLogprobs]) -> list[replies.ScoredToken]:
        def show(token: int, logprob: float) -> replies.TokenLogprob:
            # JSON has no -inf.
            text, raw = self._pieces[token]
            return replies.TokenLogprob(text, max(logprob, -9999.0), raw)

        scored = []
        for one in logprobs:
            own = show(one.token, one.logprob)
            tops = [show(*top) for top in one.top]
            scored.append(replies.ScoredToken(own.token, own.logprob, tops, own.raw))
        return scored

    def _drop(self, name: str) -> None:
        del self._ids[self._numbers.pop(name)]

    def _stats(self) -> replies.Stats:
        at_least = self._num_by_accepted[::-1].cumsum()[::-1]
        return replies.Stats(
            t_s=self._now(),
            num_running=self._worker.num_running,
            num_waiting=self._worker.num_waiting,
            kv_usage=self._worker.scheduler.kv_usage,
            mode=self._mode,
            link=asdict(self._link.stats) if isinstance(self._link, EngineLink) else None,
            busy_s=self._busy_s,
            num_accepted_per_position=at_least[1 : self._facts.max_length + 1].tolist(),
            **self._totals,
        )

    def _now(self) -> float:
        return round(self._clock() - self._start_s, 6)

    def _error(self, message: str, request_id: str | None = None) -> None:
        self._say(replies.Error(request_id, message))

    def _say(self, reply: replies.Reply) -> None:
        self._out.append(replies.encode(reply))

    def _flush(self) -> None:
        if self._out:
            self._sink.write(b"\n".join(self._out) + b"\n")
            self._sink.flush()
            self._out.clear()


_NOTHING = b"\n"  #: stands for no line; a real blank line means as little


def _next(lines: queue.SimpleQueue[bytes | None], wait_s: float | None) -> bytes | None:
    """The next line; `_NOTHING` after a while. None: as long as it takes."""
    try:
        return lines.get(block=wait_s != 0.0, timeout=wait_s)
    except queue.Empty:
        return _NOTHING


def _read(source: BinaryIO, lines: queue.SimpleQueue[bytes | None]) -> None:
    # Past the buffer: its lock, held by a thread that waits for input, would break the exit.
    raw = getattr(source, "raw", source)
    rest = b""
    while chunk := raw.read(1 << 16):
        *complete, rest = (rest + chunk).split(b"\n")
        for line in complete:
            lines.put(line)
    if rest:
        lines.put(rest)
    lines.put(None)
