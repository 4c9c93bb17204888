"""Recorded drafts from a file: of `smartspec record`, or traces of all that would be accepted.

A step that drafts k for a request of which a < k are accepted says what its next positions bring:
a, a - 1, ... 0 drafts in a row. Where all k were accepted, or none of what was to be had was
drafted, the run may be longer: it is taken to go on through the token that the target drew if at
the next step's first position there is a run too.

So an engine should be recorded that drafts its longest; a recording that leaves too much open is
refused. At a position where no step began, an engine is taken to tell what it did at the step
before.

Traces (.npz, of benchmarks/record_acceptance.py) hold every position of every answer, of prompt
lookup and of a draft model: ``num_positions`` [A], and end to end over all answers' tokens after
the first ``lookup_run``, ``match_length`` and ``match_agreement``, or ``draft_run``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from smartspec.daemon.recording import RecordingError
from smartspec.engine_adapter.base import (
    FEATURE_LAST_SHARE,
    FEATURE_MATCH_AGREEMENT,
    FEATURE_MATCH_LENGTH,
)
from smartspec.engine_adapter.simulator.acceptance import MATCHED, MAX_RUN
from smartspec.engine_adapter.simulator.recorded import Answer, Recorded
from smartspec.engine_adapter.simulator.requests import F32
from smartspec.lab.profiles.observed import Observed, Visit, of_recording

#: Of steps with drafts to be had, those of which it is open what longer ones would have brought. Up
#: to 0.2, simulated engines recorded at short lengths were replayed up to 4% too slow.
MOST_OPEN = 0.2
LOOKUP_COLUMNS = ("lookup_run", "match_length", "match_agreement")


def load(path: Path, *, is_lookup: bool, max_length: int | None = None) -> Recorded:
    """Whole answers of a file whose drafts are lookups, or a draft model's.

    ``max_length`` : drafts that are to be told; None: as many as were recorded

    Raises ValueError saying what is wrong with the file, or why it cannot serve for that.
    """
    try:
        if zipfile.is_zipfile(path):
            return _of_traces(path, is_lookup, max_length)
        engines = of_recording(path, with_visits=True).values()
    except RecordingError as error:
        raise ValueError(f"{error}, nor traces of drafts (.npz)") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not engines:
        raise ValueError(f"{path}: no engine introduced itself in it")
    for seen in engines:
        _check(seen, path, is_lookup, max_length)
    told = {seen.hello.limits.features for seen in engines}
    if len(told) > 1:
        names = ", ".join(seen.hello.engine for seen in engines)
        raise ValueError(f"{path}: its engines ({names}) tell different features")
    parts = [of_visits(seen, sorted(set(seen.visits or ()) - seen.partial)) for seen in engines]
    answers = [answer for part in parts for answer in part.answers]
    if not any(answer.match.any() for answer in answers):
        raise ValueError(f"{path}: nothing could be drafted in any answer that is whole in it")
    return Recorded(answers, parts[0].feature_names)


def _check(seen: Observed, path: Path, is_lookup: bool, max_length: int | None) -> None:
    limits, name = seen.hello.limits, f"{path}, engine {seen.hello.engine}"
    if limits.trees:
        raise ValueError(f"{name}: drafts trees, and only chains can be played as recorded")
    if limits.drafts_known_first != is_lookup:
        kinds = ("a draft model's", "lookups")
        its, wanted = kinds[limits.drafts_known_first], kinds[is_lookup]
        raise ValueError(f"{name}: its drafts are {its}, and `draft` asks for {wanted}")
    max_length = max_length or limits.max_length
    if limits.max_length < max_length:
        raise ValueError(f"{name}: drafts at most {limits.max_length}; max_length: {max_length}")
    share = open_share(seen, max_length)
    if share > MOST_OPEN:
        raise ValueError(
            f"{name}: at {share:.0%} of the steps with drafts to be had it is not known what "
            f"{max_length} would have brought, as fewer were drafted and none was wrong: record "
            "while the engine drafts its longest"
        )


def open_share(seen: Observed, max_length: int) -> float:
    """Of steps with drafts to be had, those that do not tell what ``max_length`` would bring."""
    able = [v for visits in (seen.visits or {}).values() for v in visits if v.num_available]
    held = sum(v.num_accepted == v.num_drafted < min(v.num_available, max_length) for v in able)
    return held / max(len(able), 1)


def _of_traces(path: Path, is_lookup: bool, max_length: int | None) -> Recorded:
    names = LOOKUP_COLUMNS if is_lookup else ("draft_run",)
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in ("num_positions", *names)}
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not traces of drafts: {error}") from error
    sizes = columns["num_positions"].astype(np.int64)
    if any(len(columns[name]) != sizes.sum() for name in names):
        raise ValueError(f"{path}: not traces of drafts: columns differ in size")
    if not sizes.sum():
        raise ValueError(f"{path}: no answers in it")
    run = columns[names[0]].astype(np.uint8)
    if run.max(initial=0) < (max_length or 0):
        raise ValueError(
            f"{path}: drafts were recorded up to {run.max(initial=0)}; max_length: {max_length}"
        )
    told: tuple[str, ...] = ()
    match, features = np.full(len(run), MATCHED, np.uint8), np.empty((0, len(run)), np.float32)
    if is_lookup:
        told, match = (FEATURE_MATCH_LENGTH, FEATURE_MATCH_AGREEMENT), columns["match_length"]
        features = np.array([columns[name] for name in LOOKUP_COLUMNS[1:]], np.float32)
    ends = np.cumsum(sizes)
    return Recorded(
        [
            Answer(
                np.concatenate([[0], run[at]]).astype(np.uint8),
                np.concatenate([[0], match[at]]).astype(np.uint8),
                np.concatenate([np.zeros((len(told), 1)), features[:, at]], axis=1).astype("f4"),
            )
            for at in map(slice, ends - sizes, ends)
        ],
        told,
    )


def of_visits(seen: Observed, requests: Iterable[int]) -> Recorded:
    """The answers of ``requests`` by the engine's ids, in this order; without drafts if not seen.

    For engines that look up, or draft their longest: what was not drafted is not known.

    Raises ValueError where ``seen`` was read without visits.
    """
    if seen.visits is None:
        raise ValueError("read the recording with_visits")
    names = seen.hello.limits.features
    kept = [i for i, name in enumerate(names) if name != FEATURE_LAST_SHARE]
    answers = []
    for request in requests:
        visits = seen.visits.get(request, [])
        run, match, features = positions(visits, len(names))
        answers.append(Answer(run, match, features[kept]))
    return Recorded(answers, tuple(names[i] for i in kept))


def positions(visits: Sequence[Visit], num_features: int) -> Answer:
    """Of one answer.

    >>> first, last = Visit(3, 2, 2, 2, ()), Visit(2, 5, 1, 5, ())
    >>> positions([first, last], num_features=0).run.tolist()
    [0, 4, 3, 2, 1, 0]
    """
    size = 1 + sum(visit.num_emitted for visit in visits)
    run, match = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    features: F32 = np.zeros((num_features, size), np.float32)
    end, following = size, 0  # of the positions after a visit: where, and the run at the first
    for visit in reversed(visits):
        begin = end - visit.num_emitted
        accepted = visit.num_accepted
        is_open = accepted == visit.num_drafted and visit.num_available > 0
        whole = accepted + 1 + following if is_open and following else accepted
        run[begin:end] = np.clip(whole - np.arange(end - begin), 0, MAX_RUN)
        if visit.num_available:
            match[begin:end] = np.where(np.arange(end - begin) <= accepted, MATCHED, 0)
        features[:, begin:end] = np.array(visit.features, np.float32)[:, None]
        end, following = begin, int(run[begin]) if visit.num_emitted else following
    return Answer(run, match, features)
