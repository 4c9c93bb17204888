"""What would have been decided? A recording, run through the real loop under other settings.

The loop is the daemon's own, on the recording's clock: the same frames in the same turns. It starts
cold. Engines did then what they were told then: the replay says what would have been *decided* for
those steps, not what would have come of it.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from smartspec.daemon.config import Settings
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.event_bus import BusEvent, DecisionEvent, FrameEvent
from smartspec.daemon.recording import EXIT_UNUSABLE, RecordingError, read
from smartspec.daemon.views.inspect import shown
from smartspec.engine_adapter import messages
from smartspec.engine_adapter.messages import Hello, MessageError, Policy, StepReport

NUM_DIFFERENCES = 5  #: told in full


class Side(Struct, kw_only=True):
    """One side of the comparison, recorded or replayed; means over what was decided."""

    num_decisions: int = 0
    mean_length: float = 0.0  #: recorded: drafted and verified; replayed: chosen
    share_off: float = 0.0  #: of steps (recorded) or decisions (replayed) without speculation
    predicted_goodput: float = 0.0  #: tokens per second
    value_of_time: float = 0.0  #: tokens per second
    depth: float = 0.0
    last_reason: str = ""


class Difference(Struct, frozen=True, kw_only=True):
    """A step for which the two decided differently."""

    t_s: float
    engine: str
    recorded: str
    replayed: str


class Comparison(Struct, kw_only=True):
    """An engine's decisions, as recorded and as replayed."""

    engine: str
    num_reports: int = 0
    goodput: float = 0.0  #: measured then, tokens per second of steps
    recorded: Side
    replayed: Side
    num_both: int = 0  #: steps for which both made a policy
    share_other_depth: float = 0.0  #: of these
    mean_abs_log_value: float = 0.0  #: of the values of time's ratio
    largest: list[Difference] = []


class _Mean:
    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self.total += value * weight
        self.count += weight

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


class _Tally:
    """Sums of one side, in constant memory."""

    def __init__(self) -> None:
        self.num_decisions = 0
        self.last_reason = ""
        self._means: defaultdict[str, _Mean] = defaultdict(_Mean)  # by `Side`'s names

    def drafted(self, counts: Iterable[tuple[int, int]]) -> None:
        """``counts`` : lengths of a step, and requests at each."""
        pairs = list(counts)
        size, total = sum(n for _, n in pairs), sum(k * n for k, n in pairs)
        self._means["mean_length"].add(total / size if size else 0.0, size)
        self._means["share_off"].add(float(total == 0))

    def decided(self, made: Policy | DecisionEvent) -> None:
        self.num_decisions += 1
        self.last_reason = made.reason
        for name in ("predicted_goodput", "value_of_time", "depth"):
            self._means[name].add(getattr(made, name))

    def side(self) -> Side:
        means = {name: mean.value for name, mean in self._means.items()}
        return Side(num_decisions=self.num_decisions, last_reason=self.last_reason, **means)


class _Engine:
    def __init__(self, name: str) -> None:
        self.name = name
        self.num_reports = 0
        self.num_emitted = 0
        self.seconds = 0.0
        self.recorded, self.replayed = _Tally(), _Tally()
        self.other_depth, self.log_value = _Mean(), _Mean()
        self.largest: list[tuple[float, int, Difference]] = []

    def reported(self, report: StepReport) -> None:
        self.num_reports += 1
        drafted, emitted = report.num_drafted, report.num_emitted
        self.seconds += report.step_s
        self.num_emitted += sum(emitted) if emitted else len(drafted)
        if drafted:
            self.recorded.drafted((k, 1) for k in drafted)

    def chose(self, event: DecisionEvent) -> None:
        self.replayed.drafted(enumerate(event.length_counts))
        self.replayed.decided(event)

    def compare(self, policy: Policy, event: DecisionEvent, t_s: float) -> None:
        self.other_depth.add(float(policy.depth != event.depth))
        if policy.value_of_time > 0 and event.value_of_time > 0:
            apart = abs(math.log(event.value_of_time / policy.value_of_time))
        else:
            apart = float(policy.value_of_time != event.value_of_time)
        self.log_value.add(apart)
        if policy.depth == event.depth and apart < 1e-9:
            return
        told = Difference(t_s=t_s, engine=self.name, recorded=policy.reason, replayed=event.reason)
        weight = apart + abs(policy.depth - event.depth)
        heapq.heappush(self.largest, (weight, -self.num_reports, told))
        if len(self.largest) > NUM_DIFFERENCES:
            heapq.heappop(self.largest)

    def comparison(self) -> Comparison:
        return Comparison(
            engine=self.name,
            num_reports=self.num_reports,
            goodput=self.num_emitted / self.seconds if self.seconds else 0.0,
            recorded=self.recorded.side(),
            replayed=self.replayed.side(),
            num_both=round(self.other_depth.count),
            share_other_depth=self.other_depth.value,
            mean_abs_log_value=self.log_value.value,
            largest=[told for _, _, told in sorted(self.largest, reverse=True)],
        )


class _Playback:
    """A transport, a bus and a clock that follow a recording."""

    num_unsendable = 0
    num_denied = 0
    num_dropped = 0

    def __init__(self) -> None:
        self.now = 0.0
        self.inbox: deque[tuple[bytes, bytes]] = deque()
        self.decisions: list[DecisionEvent] = []

    def clock(self) -> float:
        return self.now

    def wait(self, timeout_s: float) -> bool:
        return bool(self.inbox)

    def receive(self) -> tuple[bytes, bytes] | None:
        return self.inbox.popleft() if self.inbox else None

    def send(self, peer: bytes, frame: bytes) -> bool:
        return True

    def reload(self) -> None:
        pass

    def publish(self, event: BusEvent) -> None:
        if isinstance(event, DecisionEvent):
            self.decisions.append(event)

    def wants(self, kind: type[Any]) -> bool:
        return False

    def close(self) -> None:
        pass


def replay(frames: Iterable[FrameEvent], settings: Settings) -> list[Comparison]:
    """Run frames through a loop with these settings; one comparison per engine, by name."""
    playback = _Playback()
    loop: ControlLoop | None = None
    engines: dict[str, _Engine] = {}
    names: dict[bytes, str] = {}
    for _, group in groupby(frames, key=lambda frame: frame.turn):
        turn = list(group)
        playback.now = max(playback.now, turn[0].at_s)
        if loop is None:  # its timers begin with the recording
            loop = ControlLoop(settings, playback, playback, playback.clock, playback.clock)
        told: dict[str, Policy] = {}
        for event in turn:
            if event.inbound:
                playback.inbox.append((event.peer, event.frame))
                message = _engine_message(event.frame)
                if isinstance(message, Hello):
                    names[event.peer] = message.engine
                    engines.setdefault(message.engine, _Engine(message.engine))
                elif isinstance(message, StepReport) and event.peer in names:
                    engines[names[event.peer]].reported(message)
            elif event.peer in names and (policy := _policy(event.frame)) is not None:
                told[names[event.peer]] = policy
                engines[names[event.peer]].recorded.decided(policy)
        while playback.inbox:
            loop.cycle(0.0)
        for decision in playback.decisions:
            if (engine := engines.get(decision.engine)) is not None:
                engine.chose(decision)
                if (policy := told.get(decision.engine)) is not None:
                    engine.compare(policy, decision, turn[0].t_s)
        playback.decisions.clear()
    return [engines[name].comparison() for name in sorted(engines)]


def _engine_message(frame: bytes) -> messages.EngineMessage | None:
    try:
        return messages.decode_engine_message(frame)
    except MessageError:
        return None  # the loop counts it, as it did then


def _policy(frame: bytes) -> Policy | None:
    try:
        message = messages.decode_daemon_message(frame)
    except MessageError:
        return None
    return message if isinstance(message, Policy) else None


# -- the command --------------------------------------------------------------------------------


def table(comparisons: list[Comparison]) -> Any:
    """A rich renderable."""
    from rich.console import Group
    from rich.table import Table

    made = Table(title="Recorded, and as it would have been decided")
    for heading in ("engine", "", "decisions", "mean length", "off", "depth", "predicted tok/s"):
        made.add_column(heading, no_wrap=True)
    made.add_column("last reason")
    lines: list[Any] = [made]
    for one in comparisons:
        other, apart = one.share_other_depth, math.expm1(one.mean_abs_log_value)
        # What a recording holds are policies, and one that says nothing new was not sent.
        for words, what, side in (
            ("recorded", "sent", one.recorded),
            ("replayed", "made", one.replayed),
        ):
            cells = (
                one.engine if side is one.recorded else "",
                words,
                f"{side.num_decisions} {what}",
                f"{side.mean_length:.2f}",
                f"{100 * side.share_off:.0f}%",
                f"{side.depth:.1f}",
                f"{side.predicted_goodput:.0f}",
                side.last_reason or "-",
            )
            made.add_row(*map(shown, cells))
        lines.append(
            shown(
                f"{one.engine}: {one.num_reports} reports, {one.goodput:.0f} tok/s measured; of "
                f"{one.num_both} policies {100 * other:.0f}% have another depth, "
                f"values of time differ by {100 * apart:.1f}% on average"
            )
        )
        for told in one.largest:
            lines.append(shown(f"  then:  {told.recorded}"))
            lines.append(shown(f"  now:   {told.replayed}"))
    return Group(*lines)


def run(settings: Settings, path: Path, as_json: bool = False) -> int:
    """Replay a file and print the differences; returns the exit code."""
    from rich import progress
    from rich.console import Console

    try:
        with progress.open(
            path, "rb", description="replay", transient=True, console=Console(stderr=True)
        ) as file:
            comparisons = replay(_named(file, path), settings)
    except RecordingError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{path}: cannot be read ({error.strerror})")
    if not comparisons:
        return _fail(f"{path}: no engine introduced itself in this recording")
    if as_json:
        content = msgspec.json.encode({"recording": str(path), "engines": comparisons})
        print(msgspec.json.format(content, indent=2).decode())
    else:
        Console().print(table(comparisons))
    return 0


def _named(file: Any, path: Path) -> Iterator[FrameEvent]:
    return read(file, str(path))


def _fail(text: str) -> int:
    print(f"smartspec replay: {text}", file=sys.stderr)
    return EXIT_UNUSABLE
