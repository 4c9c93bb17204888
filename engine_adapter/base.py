"""The adapter contract: what an engine tells before a step, and what it tells after.

An adapter does two things per step. Before the step it describes the batch that is about to be
decoded (`DecodeBatch`) and asks a `LengthSource` for one speculation length per request. After
the step it says what happened (`StepFacts`). Everything else (transport, learning, policies) is
somebody else's work.

`EngineLink` (link.py) is the source that a daemon steers. `FixedLength` is the engine's own
static configuration, and the kill switch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter import messages
from smartspec.engine_adapter.lengths import Choice

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
F32 = npt.NDArray[np.float32]

#: Features that an engine may know at step time and announces in its Hello. The daemon cuts buckets
#: of the acceptance table from those that it has found to be of use (estimators/features.py).
FEATURE_LAST_SHARE = "last_accepted_share"  #: accepted / drafted when last drafted for; -1 if never
FEATURE_MATCH_LENGTH = "match_length"  #: tokens matched by prompt lookup; 0 without a match
#: how far the earlier occurrences of a lookup's match agree on what comes next, 0 to 1
FEATURE_MATCH_AGREEMENT = "match_agreement"
#: share of drafts that were right after the token that the request now ends with, 0 to 1
#: (token_acceptance.py); where the draft is known beforehand, joined with the share of such drafts
FEATURE_TOKEN_ACCEPTANCE = "token_acceptance"
#: the same of the second draft, where both are known beforehand, 0 to 1
FEATURE_SECOND_ACCEPTANCE = "second_acceptance"
FEATURE_DRAFT_CONFIDENCE = messages.FEATURE_DRAFT_CONFIDENCE  #: of its first draft, if run by then


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """The decoding requests of the step about to run, as columns of one length B.

    Requests that only prefill in this step are not in it; their tokens are `num_prefill_tokens`.
    """

    request_ids: U64  #: [B], unique within an engine epoch
    ceiling: U8  #: [B], longest length possible now (drafts available, room, opt-out)
    features: F32  #: [F, B], rows in the order announced in the Hello
    num_prefill_tokens: int = 0  #: prompt tokens that share the target's forward pass
    weight: F32 | None = None  #: [B] > 0, value of a token of this request; None: all 1
    floor: U8 | None = None  #: [B], shortest length allowed (clipped to the ceiling); None: all 0
    token_time_target_s: F32 | None = None  #: [B], seconds per token at most, 0: any; None: all 0

    @property
    def size(self) -> int:
        return len(self.request_ids)


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What one step did and took. Times in seconds on the engine's monotonic clock."""

    batch: DecodeBatch
    num_drafted: U8  #: [B], draft tokens *verified* in this step
    num_accepted: U8  #: [B], of these, accepted
    num_emitted: U8  #: [B], tokens added to the answer (accepted + 1, less at a stop)
    step_s: float  #: the whole step
    target_s: float | None  #: forward, sampling and acceptance of the target; None: not seen apart
    draft_s: float | None  #: drafting included in step_s; None: not seen apart
    context_tokens: int  #: KV entries read: sum over the decoding requests
    num_draft_forwards: int = 0  #: sequential draft passes included in the times
    num_draft_tokens: int = 0  #: tokens drafted in these passes
    num_catch_up_tokens: int = 0  #: tokens that the drafter had to process to be in step again
    num_waiting: int = 0  #: requests queued, not yet running
    kv_usage: float = 0.0  #: share of the KV room in use, 0 to 1
    mode: str = "ragged"  #: execution mode of the target's pass
    #: [B], of trees: bit j is set when node j was accepted, or was cut and would be
    accepted_ranks: U64 | None = None
    num_cut: U8 | None = None  #: [B], drafts behind those verified that were not; None: all 0
    num_cut_accepted: U8 | None = None  #: [B], of these, those that would be (messages.StepReport)
    #: what was chosen for this step, where the engine has asked for a later one's lengths since
    choice: Choice | None = None


class LengthSource(Protocol):
    """Decides speculation lengths at step time and hears what came of them. Never blocks."""

    def choose(self, batch: DecodeBatch) -> Choice:
        """Return one length per request, at most its ceiling."""

    def report(self, facts: StepFacts) -> None:
        """Take note of a finished step. Called after every step that decoded or prefilled."""

    def idle(self) -> None:
        """Called now and then (ten times a second will do) while there is nothing to run."""

    def close(self) -> None:
        """Release what is held; idempotent."""


class FixedLength:
    """The same length for every request: an engine's static configuration (0: no speculation).

    As far as its floor and its ceiling allow.
    """

    def __init__(self, length: int) -> None:
        if length < 0:
            raise ValueError(f"length must be >= 0, got {length}")
        self.length = length

    def choose(self, batch: DecodeBatch) -> Choice:
        wanted = self.length if batch.floor is None else np.maximum(batch.floor, self.length)
        return Choice.fixed(np.minimum(batch.ceiling, wanted).astype(np.int64), source="own")

    def report(self, facts: StepFacts) -> None:
        pass

    def idle(self) -> None:
        pass

    def close(self) -> None:
        pass
