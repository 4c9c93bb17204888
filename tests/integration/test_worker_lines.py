"""The worker process's JSON lines: what goes in, what comes out, what is refused."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from servers import eventually
from tiny_models import LetterTokenizer, RandomLengths, space_tokenizer, tiny_model

from smartspec.engine_adapter.base import DecodeBatch, StepFacts
from smartspec.engine_adapter.lengths import Choice
from smartspec.engine_adapter.reference.line_server import LineServer, LinkFactory
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.replies import Ready
from smartspec.engine_adapter.reference.worker import Worker

pytestmark = pytest.mark.integration

FACTS = Ready(
    model="tiny", draft_model="", proposer="lookup", features=("last_accepted_share",),
    max_length=4, own_length=2, max_num_running=4, max_model_len=64, device="cpu",
    dtype="float64", engine_version="0",
)  # fmt: skip


class TalkingTokenizer(LetterTokenizer):
    """Encodes letters too, and knows a chat template."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.pieces.index(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(message["role"][0] + message["content"] for message in messages) + "a"


class SteeredLink(RandomLengths):
    """A link that remembers how it was used."""

    def __init__(self, facts: Ready) -> None:
        super().__init__(seed=0)
        self.worker_facts = facts
        self.num_idle = 0
        self.closed = False

    def idle(self) -> None:
        self.num_idle += 1

    def close(self) -> None:
        self.closed = True


def serve(*lines: str | dict[str, Any], factory: LinkFactory | None = None, steps: bool = False,
          **settings: Any) -> list[dict[str, Any]]:  # fmt: skip
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    sink = io.BytesIO()
    build(sink, factory, steps, **settings).run(io.BytesIO("\n".join(text).encode()))
    return [json.loads(line) for line in sink.getvalue().splitlines()]


def build(
    sink: Any,
    factory: LinkFactory | None = None,
    steps: bool = False,
    tokenizer: Any = None,
    **settings: Any,
) -> LineServer:
    tokenizer = tokenizer or TalkingTokenizer()
    worker = Worker(
        tiny_model("llama"),
        tokenizer,
        PromptLookup(4, min_ngram=1),
        max_num_running=4,
        max_model_len=64,
        seed=0,
        **settings,
    )
    return LineServer(worker, tokenizer, FACTS, sink, factory, steps)


def submit(name: str, **fields: Any) -> dict[str, Any]:
    return {"op": "submit", "id": name, "max_tokens": 12} | fields


def of(events: list[dict[str, Any]], kind: str, name: str | None = None) -> list[dict[str, Any]]:
    return [e for e in events if e["event"] == kind and (name is None or e.get("id") == name)]


def test_requests_are_answered_when_lines_are_good() -> None:
    events = serve(
        submit("a", prompt="abcabcabc"),
        submit("b", messages=[{"role": "user", "content": "hello"}], temperature=0.9, seed=1),
    )
    assert events[0]["event"] == "ready"
    assert events[0]["max_length"] == 4
    assert events[-1] == {"event": "stopped"}
    for name in "ab":
        (finished,) = of(events, "finished", name)
        tokens = of(events, "token", name)
        assert finished["reason"] == "length"
        assert finished["num_tokens"] == tokens[-1]["num_tokens"] == 12
        assert finished["latency_s"] >= finished["time_to_first_token_s"] > 0
        assert [e["t_s"] for e in tokens] == sorted(e["t_s"] for e in tokens)
    assert not of(events, "error")


def test_chat_template_makes_the_prompt_when_messages_are_given() -> None:
    chat = serve(submit("a", messages=[{"role": "user", "content": "xyz"}]))
    plain = serve(submit("a", prompt="uxyza"))
    text = ["".join(e["text"] for e in of(events, "token")) for events in (chat, plain)]
    assert text[0] == text[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "malformed"),
        ('{"op":"submit","id":"x","prompt":"a"', "truncated"),
        ("[1, 2]", "Expected `object`"),
        ({"op": "fly"}, "Invalid value 'fly'"),
        ({"op": "submit"}, "missing required field `id`"),
        ({"op": "submit", "id": "x"}, "either messages or prompt"),
        ({"op": "submit", "id": "x", "prompt": "a", "temprature": 1}, "unknown field `temprature`"),
        ({"op": "submit", "id": "x", "prompt": "a", "max_tokens": "many"}, "Expected `int | null`"),
        ({"op": "submit", "id": "x", "prompt": "a", "top_p": 2.0}, "top_p must be in"),
        ({"op": "submit", "id": "x", "prompt": ""}, "at least one token"),
        ({"op": "submit", "id": "x", "prompt": "A"}, "ValueError"),
        ({"op": "submit", "id": "x", "prompt": "a" * 80}, "exceed max_model_len=64"),
        ({"op": "submit", "id": "x", "prompt": "a", "prompt_token_ids": [1]}, "either messages"),
        ({"op": "submit", "id": "x", "prompt_token_ids": []}, "at least one token"),
        ({"op": "submit", "id": "x", "prompt_token_ids": [48]}, "token ids must be in [0, 48)"),
        ({"op": "submit", "id": "x", "prompt_token_ids": [-1]}, "token ids must be in [0, 48)"),
        ({"op": "submit", "id": "x", "prompt": "a", "token_time_target_s": 0.0}, "finite and > 0"),
        ({"op": "submit", "id": "x", "prompt": "a", "logprobs": 21}, "num_logprobs must be in"),
        ({"op": "cancel", "id": "nobody"}, "no such request"),
        ({"op": "speculation", "mode": "smartspec"}, "without a daemon's address"),
        ({"op": "speculation", "mode": "static"}, "length goes with mode static"),
        ({"op": "speculation", "mode": "static", "length": -1}, "length must be >= 0"),
        ("\x00\xff", "malformed"),
    ],
)  # fmt: skip
def test_line_is_answered_with_an_error_when_it_is_bad(
    line: str | dict[str, Any], message: str
) -> None:
    events = serve(submit("good", prompt="abc"), line, submit("later", prompt="abc"))
    (error,) = of(events, "error")
    assert message in error["message"]
    assert {e["id"] for e in of(events, "finished")} == {"good", "later"}


def test_token_ids_mean_the_same_as_their_text() -> None:
    text, ids = (
        serve(submit("a", **prompt))
        for prompt in ({"prompt": "abc"}, {"prompt_token_ids": [0, 1, 2]})
    )
    told = [[e["text"] for e in of(events, "token")] for events in (text, ids)]
    assert told[0] == told[1]


def test_logprobs_are_the_same_when_drafted_for() -> None:
    def scores(length: int) -> list[dict[str, Any]]:
        events = serve(
            {"op": "speculation", "mode": "static", "length": length},
            submit("a", prompt="ababab", logprobs=2, max_tokens=30),
            submit("plain", prompt="ababab"),
        )
        assert all("logprobs" not in e for e in of(events, "token", "plain"))
        return [one for e in of(events, "token", "a") for one in e["logprobs"]]

    alone, drafted = scores(0), scores(4)
    assert len(alone) == 30
    for one, other in zip(alone, drafted, strict=True):
        assert one["token"] == other["token"]
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-9)
        assert one["logprob"] == pytest.approx(one["top"][0][1])  # it is greedy
        assert [top[0] for top in one["top"]] == [top[0] for top in other["top"]]
        assert one["top"][0][1] >= one["top"][1][1]


def test_tokens_and_text_keep_their_first_space_when_the_decoder_drops_that_of_a_text() -> None:
    lines = [
        submit(f"{word}", prompt_token_ids=[7, word], logprobs=1, max_tokens=6)
        for word in range(0, 37, 2)
    ]
    events = serve(*lines, tokenizer=space_tokenizer())
    firsts = set()
    for line in lines:
        told = of(events, "token", line["id"])
        tokens = [one["token"] for event in told for one in event["logprobs"]]
        text = "".join(event["text"] for event in told)
        if "\ufffd" not in text:
            assert "".join(token for token in tokens if token != "<s>") == text
            firsts.add(text[0])
    assert " " in firsts and len(firsts) > 3


def test_target_time_per_token_reaches_the_sequence() -> None:
    server = build(io.BytesIO())
    server.handle(json.dumps(submit("a", prompt="abc", token_time_target_s=0.05)).encode())
    (sequence,) = server._worker.scheduler.waiting
    assert sequence.request.token_time_target_s == 0.05


def test_id_is_refused_when_in_use_and_free_again_afterwards() -> None:
    events = serve(submit("a", prompt="abc"), submit("a", prompt="abc"))
    assert ["in use" in e["message"] for e in of(events, "error", "a")] == [True]
    assert len(of(events, "finished", "a")) == 1


def test_request_ends_when_cancelled() -> None:
    events = serve(submit("a", prompt="abc", max_tokens=50), {"op": "cancel", "id": "a"})
    (finished,) = of(events, "finished", "a")
    assert finished["reason"] == "cancelled"
    assert not of(events, "token")


def test_nothing_is_taken_after_stop_and_everything_is_finished() -> None:
    events = serve(submit("a", prompt="abc"), {"op": "stop"}, submit("b", prompt="abc"))
    assert [e["id"] for e in of(events, "finished")] == ["a"]
    assert all("stopping" in e["message"] for e in of(events, "error"))


def test_step_events_tell_lengths_when_asked_for() -> None:
    assert not of(serve(submit("a", prompt="ababab")), "step")
    steps = of(serve(submit("a", prompt="ababab"), steps=True), "step")
    decoding = [e for e in steps if e["lengths"]]
    assert decoding
    assert all(len(e["lengths"]) == len(e["num_drafted"]) == 1 for e in decoding)
    assert all(e["step_s"] > 0 and e["source"] == "own" for e in steps)


def test_no_step_is_taken_while_held() -> None:
    sink = io.BytesIO()
    server = build(sink, steps=True)
    lines = [submit("a", prompt="ababab"), {"op": "stats"}]
    source_read, source_write = os.pipe()
    with os.fdopen(source_read, "rb") as source, os.fdopen(source_write, "wb", 0) as said:
        thread = threading.Thread(target=server.run, args=(source,))
        thread.start()
        said.write(b'{"op":"hold"}\n')
        eventually(lambda: b'"held"' in sink.getvalue())
        said.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        eventually(lambda: b'"stats"' in sink.getvalue())
        time.sleep(0.3)
        held = [json.loads(line) for line in sink.getvalue().splitlines()]
        assert [event["event"] for event in held] == ["ready", "held", "stats"]
        assert held[-1]["num_waiting"] == 1
        said.write(b'{"op":"resume"}\n')
        eventually(lambda: b'"finished"' in sink.getvalue())
        said.write(b'{"op":"hold"}\n')
        eventually(lambda: sink.getvalue().count(b'"held"') == 2)
        said.write(json.dumps(submit("b", prompt="ab")).encode() + b"\n")
        said.close()  # the end of input ends the hold too
        thread.join(timeout=10)
    assert not thread.is_alive()
    finished = of([json.loads(line) for line in sink.getvalue().splitlines()], "finished")
    assert [event["id"] for event in finished] == ["a", "b"]


def test_stats_count_what_happened() -> None:
    sink = io.BytesIO()
    server = build(sink)
    server.handle(b'{"op":"stats"}')
    server.run(io.BytesIO(json.dumps(submit("a", prompt="ababab")).encode()))
    server.handle(b'{"op":"stats"}')
    server._flush()
    first, last = of([json.loads(line) for line in sink.getvalue().splitlines()], "stats")
    assert first["num_tokens"] == first["num_steps"] == 0
    assert last["num_tokens"] == 12
    assert last["num_drafted"] >= last["num_accepted"]
    assert sum(last["num_accepted_per_position"]) == last["num_accepted"]
    assert last["num_drafts"] >= last["num_accepted_per_position"][0]
    assert len(last["num_accepted_per_position"]) == FACTS.max_length
    assert last["num_running"] == last["num_waiting"] == 0


def test_length_source_changes_between_steps_when_told_to() -> None:
    links: list[SteeredLink] = []

    def factory(facts: Ready) -> SteeredLink:
        links.append(SteeredLink(facts))
        return links[-1]

    read_end, write_end = os.pipe()
    sink_read, sink_write = os.pipe()
    sink, source = os.fdopen(sink_write, "wb"), os.fdopen(read_end, "rb")
    thread = threading.Thread(target=build(sink, factory, steps=True).run, args=(source,))
    thread.start()
    events: list[dict[str, Any]] = []

    with os.fdopen(sink_read, "rb") as heard, os.fdopen(write_end, "wb") as said:

        def say(*lines: dict[str, Any]) -> None:
            said.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            said.flush()

        def hear(kind: str) -> dict[str, Any]:
            while True:
                events.append(json.loads(heard.readline()))
                if events[-1]["event"] == kind:
                    return events[-1]

        hear("ready")
        for mode in ("own", "smartspec", "static", "smartspec", "own"):
            switch: dict[str, Any] = {"op": "speculation", "mode": mode}
            say(switch | ({"length": 1} if mode == "static" else {}))
            say(submit("a", prompt="abababab", max_tokens=20))
            seen = len(events)
            hear("finished")
            say({"op": "stats"})
            assert hear("stats")["mode"] == mode
            steps = [e for e in events[seen:] if e["event"] == "step" and e["lengths"]]
            longest = max(length for e in steps for length in e["lengths"])
            assert {e["source"] for e in steps} == {"policy" if mode == "smartspec" else "own"}
            assert mode == "smartspec" or longest <= {"own": 2, "static": 1}[mode]
        say({"op": "stop"})
        hear("stopped")
        thread.join(timeout=10)
    assert not thread.is_alive()
    sink.close()
    source.close()
    (link,) = links
    assert link.worker_facts is FACTS
    assert link.closed
    assert link.facts


def test_link_is_kept_in_touch_when_there_is_nothing_to_decode() -> None:
    links: list[SteeredLink] = []
    idled = threading.Event()

    class Idler(SteeredLink):
        def idle(self) -> None:
            idled.set()

    def factory(facts: Ready) -> SteeredLink:
        links.append(Idler(facts))
        return links[-1]

    read_end, write_end = os.pipe()
    server = build(io.BytesIO(), factory)
    server.switch("smartspec")
    source = os.fdopen(read_end, "rb")
    thread = threading.Thread(target=server.run, args=(source,))
    thread.start()
    assert idled.wait(timeout=10)
    os.close(write_end)
    thread.join(timeout=10)
    assert not thread.is_alive()
    source.close()
    assert links[0].closed


def test_decoding_goes_on_when_a_link_asks_for_nonsense() -> None:
    class Nonsense(SteeredLink):
        def choose(self, batch: DecodeBatch) -> Choice:
            choice = super().choose(batch)
            return choice._replace(lengths=choice.lengths * 1000 - 7)

        def report(self, facts: StepFacts) -> None:
            assert (facts.num_drafted <= facts.batch.ceiling).all()

    plain = serve(submit("a", prompt="ababab", max_tokens=30))
    make: Callable[[Ready], SteeredLink] = Nonsense
    steered = serve(
        {"op": "speculation", "mode": "smartspec"},
        submit("a", prompt="ababab", max_tokens=30),
        factory=make,
    )
    text = ["".join(e["text"] for e in of(events, "token")) for events in (plain, steered)]
    assert text[0] == text[1]
