"""What drafts brought at every position of the answers that an engine reported.

A step that drafts k for a request of which a < k are accepted says what its next positions bring:
a, a - 1, ... 0 drafts in a row. Where all k were accepted, or none of what was to be had was
drafted, the run may be longer: it is taken to go on through the token that the target drew if at
the next step's first position there is a run too.

So an engine should be recorded that drafts its longest. At a position where no step began, an
engine is taken to tell what it did at the step before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smartspec.engine_adapter.base import FEATURE_LAST_SHARE
from smartspec.engine_adapter.simulator.acceptance import MATCHED, MAX_RUN
from smartspec.engine_adapter.simulator.requests import F32, I64, U8, Outcomes
from smartspec.lab.profiles.observed import Observed, Visit

Columns = tuple[U8, U8, F32]  #: run [P], match [P], features [F, P]


def outcomes(
    seen: Observed, requests: Sequence[int], num_output: I64, *, max_length: int
) -> Outcomes:
    """Of ``requests`` by the engine's ids [R], for answers of ``num_output`` tokens [R].

    An answer longer than recorded begins anew; a request that was not seen has no drafts. For
    engines that look up: of others, drafts that were not drafted are not known.

    Raises ValueError where ``seen`` was read without visits.
    """
    if seen.visits is None:
        raise ValueError("read the recording with_visits")
    names = seen.hello.limits.features
    kept = [i for i, name in enumerate(names) if name != FEATURE_LAST_SHARE]
    sizes = num_output + max_length
    offset = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    run, match = np.zeros(offset[-1], np.uint8), np.zeros(offset[-1], np.uint8)
    features = np.zeros((len(kept), offset[-1]), np.float32)
    for i, request in enumerate(requests):
        visits = seen.visits.get(request, [])
        if not visits:
            continue
        answer_run, answer_match, answer_features = positions(visits)
        at = np.arange(num_output[i])
        source = at % len(answer_run)
        at += offset[i]
        run[at], match[at] = answer_run[source], answer_match[source]
        features[:, at] = answer_features[kept][:, source]
    unknown = np.full(len(run), np.nan, np.float32)
    told = tuple(names[i] for i in kept)
    return Outcomes(offset[:-1], run, unknown, match, told, features)


def positions(visits: Sequence[Visit]) -> Columns:
    """Of one answer. Position 0 is the token that the prompt's pass drew: nothing is drafted.

    >>> first, last = Visit(3, 2, 2, 2, ()), Visit(2, 5, 1, 5, ())
    >>> positions([first, last])[0].tolist()
    [0, 4, 3, 2, 1, 0]
    """
    size = 1 + sum(visit.num_emitted for visit in visits)
    run, match = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    features = np.zeros((len(visits[0].features), size), np.float32)
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
    return run, match, features
