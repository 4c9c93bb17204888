"""A small language model that drafts for a large one, pass after pass, for the whole batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from smartspec.engine_adapter.base import (
    FEATURE_DRAFT_CONFIDENCE,
    FEATURE_TOKEN_ACCEPTANCE,
)
from smartspec.engine_adapter.messages import NOT_RUN
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.reference.calibration import temperature_bands
from smartspec.engine_adapter.reference.candidates import NONE, Candidates, Children, Ease, Level
from smartspec.engine_adapter.reference.draft_tree import DraftTree
from smartspec.engine_adapter.reference.growth import Arrears, Growth
from smartspec.engine_adapter.reference.kv_cache import KvCache
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.proposer import Availability, Proposal
from smartspec.engine_adapter.reference.sampling import Draws, sample
from smartspec.engine_adapter.reference.sequence import Sequence
from smartspec.engine_adapter.token_acceptance import TokenAcceptance


class Spent(NamedTuple):
    """What a step's drafts took; fields as in `Proposal`."""

    num_forwards: int = 0
    num_draft_tokens: int = 0
    num_catch_up_tokens: int = 0

    def plus(
        self, num_forwards: int = 0, num_draft_tokens: int = 0, num_catch_up_tokens: int = 0
    ) -> Spent:
        return Spent(
            self.num_forwards + num_forwards,
            self.num_draft_tokens + num_draft_tokens,
            self.num_catch_up_tokens + num_catch_up_tokens,
        )


class Drafts(NamedTuple):
    """Of one request, in the last step."""

    place: int  #: in the batch
    num_tokens: int  #: that were known
    slots: list[int]  #: of the drafts in the drafter's cache, from there; `NONE`: not run


class DraftModel:
    """Drafts with a model that shares the target's vocabulary, and its noise when sampling.

    Its KV cache is kept in step lazily: what it has not seen yet (the prompt, tokens decoded at
    length 0, the target's own token after a rejection) is fed when a request is next drafted for,
    and counted as catch-up. A rejection only moves the mark back: later tokens overwrite.

    Requests that were drafted for in the last step have their first draft run before lengths are
    chosen, so that its confidence can tell how far to go. Then k drafts take k - 1 more passes;
    the next step's first is the k-th. Where lengths are left to the confidences (`propose_at`),
    nobody is looked at beforehand.

    Parameters
    ----------
    runner : the draft model, with as many cache rows as the target, and as long
    max_length : longest proposal, in tokens
    max_pass_tokens : tokens of one catch-up pass, so that long prompts do not blow up memory
    """

    name = "draft"
    trees = False
    features: tuple[str, ...] = (FEATURE_TOKEN_ACCEPTANCE, FEATURE_DRAFT_CONFIDENCE)

    def __init__(
        self, runner: ModelRunner, max_length: int = 8, max_pass_tokens: int = 512
    ) -> None:
        if not 1 <= max_length <= 255:
            raise ValueError(f"max_length must be in [1, 255], got {max_length}")
        self.max_length = max_length
        self.caches: tuple[KvCache, ...] = (runner.cache,)
        self._runner = runner
        self._max_pass_tokens = max_pass_tokens
        self._num_computed: dict[int, int] = {}  # true tokens in the draft model's cache
        self._waited: dict[int, float] = {}  # what this was worth catching up with, so far
        self._rates = TokenAcceptance()
        self._calibration = Candidates.new_calibration()
        self._drafts: dict[int, Drafts] = {}  # of this step
        self._candidates: Candidates | None = None  # of which these were chosen
        self._goes_on: set[int] = set()  # whose first draft is run before lengths are chosen
        self._first: dict[int, Children] = {}  # of these
        self._luck = np.random.default_rng(0)  # of what is told of drafts that are not verified
        self._spent = Spent()  # in this step

    def available(self, sequences: list[Sequence]) -> Availability:
        """Runs the first draft of those who were drafted for last: lengths are chosen knowing it.

        The pass is not lost as long as they go on being drafted for: `propose` goes on from it.
        """
        self._spent = Spent()
        self._first, self._drafts, self._candidates = {}, {}, None
        confidence = np.full(len(sequences), NOT_RUN, np.float32)
        goes_on = [i for i, s in enumerate(sequences) if s.id in self._goes_on]
        if goes_on:
            chosen = [sequences[i] for i in goes_on]
            first = self._open(chosen)
            self._first = dict(zip([s.id for s in chosen], first.rows(), strict=True))
            confidence[goes_on] = first.confidences.max(axis=1)
        ceiling = np.full(len(sequences), self.max_length, np.uint8)
        rates = self._rates.rates([s.tokens[-1] for s in sequences])
        return Availability(ceiling, np.stack((rates, confidence)))

    def propose(self, sequences: list[Sequence], lengths: npt.NDArray[np.int64]) -> Proposal:
        """Chains: drafts stay on the device until they are complete."""
        active = lengths > 0
        self._goes_on = {s.id for s, drafted in zip(sequences, active, strict=True) if drafted}
        passes: list[tuple[npt.NDArray[np.intp], torch.Tensor, torch.Tensor]] = []
        while active.any():
            rows, depth = np.flatnonzero(active), len(passes)
            chosen = [sequences[i] for i in rows]
            if depth == 0:
                tokens, sure = self._first_drafts(chosen)
            else:
                before, fresh, _ = passes[-1]
                if len(rows) < len(before):
                    stayed = torch.from_numpy(np.flatnonzero(np.isin(before, rows)))
                    # To wait here would be to wait for the pass before.
                    fresh = fresh[stayed.to(fresh.device, non_blocking=True)]
                segments = [Segment(s.row, s.num_tokens + depth - 1, [0], 1) for s in chosen]
                logits = self._runner.forward(segments, fresh)
                self._spent = self._spent.plus(num_forwards=1)
                positions = [[s.num_tokens + depth] for s in chosen]
                tokens, sure = self._draw(logits, chosen, positions)
            passes.append((rows, tokens, sure))
            active = active & (lengths > depth + 1)
        drafts: list[tuple[list[int], list[float]]] = [([], []) for _ in sequences]
        if passes:
            places, drawn, confident = zip(*passes, strict=True)
            for row, token, own in zip(
                np.concatenate(places).tolist(),
                torch.cat(drawn).tolist(),
                torch.cat(confident).tolist(),
                strict=True,
            ):
                drafts[row][0].append(token)
                drafts[row][1].append(own)
        temperatures = temperature_bands(s.request.sampling for s in sequences)
        ease = self._ease(sequences)
        self._candidates = Candidates(self._calibration, temperatures, ease=ease)
        self._candidates.draft([draft for draft, _ in drafts], [own for _, own in drafts])
        chains = [DraftTree.chain(draft) for draft, _ in drafts]
        fed = [[*range(chain.size - 1), NONE] for chain in chains]  # the last was not run
        self._note(sequences, fed)
        return Proposal(chains, *self._spent)

    def propose_at(
        self, sequences: list[Sequence], lengths: npt.NDArray[np.int64], prices: Prices
    ) -> Proposal:
        self._goes_on = set()  # whether the drafter is run at all is decided here
        return self._grow(sequences, self._growth(sequences, lengths, prices))

    def _growth(
        self, sequences: list[Sequence], lengths: npt.NDArray[np.int64], prices: Prices | None
    ) -> Growth:
        return Growth(
            self._calibration,
            temperature_bands(s.request.sampling for s in sequences),
            lengths,
            prices,
            chains=not self.trees,
            arrears=self._arrears(sequences),
            ease=self._ease(sequences),
        )

    def _note(self, sequences: list[Sequence], slots: list[list[int]]) -> None:
        for place, (s, fed) in enumerate(zip(sequences, slots, strict=True)):
            self._drafts[s.id] = Drafts(place, s.num_tokens, fed)

    def _grow(self, sequences: list[Sequence], growth: Growth) -> Proposal:
        """Drafts as far as ``growth`` says."""
        known_first = [place for place, s in enumerate(sequences) if s.id in self._first]
        if known_first:
            first = [self._first[sequences[place].id] for place in known_first]
            growth.add(Level.of(known_first), Children.stack(first))
        starting = growth.starting()
        self._waited.update(zip([s.id for s in sequences], growth.waited.tolist(), strict=True))
        if len(starting):
            opened = self._open([sequences[place] for place in starting.tolist()])
            growth.add(Level.of(starting), opened)
        size = self._runner.cache.max_model_len
        room = [size - sequence.num_tokens for sequence in sequences]
        while (level := growth.next_level(room)).size:
            growth.add(level, self._run(sequences, growth.candidates, level))
        cut = growth.cut(self._luck.random(len(sequences)))
        self._candidates = growth.candidates
        self._note(sequences, cut.slots)
        return Proposal(cut.verified, *self._spent, cut)

    def _arrears(self, sequences: list[Sequence]) -> Arrears:
        lag = [s.num_tokens - 1 - self._num_computed.get(s.id, 0) for s in sequences]
        waited = [self._waited.get(s.id, 0.0) for s in sequences]
        return Arrears(np.maximum(lag, 0.0), np.array(waited, np.float64))

    def _ease(self, sequences: list[Sequence]) -> Ease:
        return Ease(self._rates, np.array([s.tokens[-1] for s in sequences]))

    def _open(self, sequences: list[Sequence]) -> Children:
        """What may follow all that is known of each."""
        return self._children(
            self._begin(sequences), sequences, [[s.num_tokens] for s in sequences]
        )

    def _run(self, sequences: list[Sequence], candidates: Candidates, level: Level) -> Children:
        """Runs a level in one pass; what may follow each of its nodes."""
        chosen, segments, positions = [], [], []
        tokens, depths = candidates.tokens[level].tolist(), candidates.depths[level].tolist()
        places, begins = np.unique(level.places, return_index=True)
        ends = [*begins[1:].tolist(), level.size]
        for place, begin, end in zip(places.tolist(), begins.tolist(), ends, strict=True):
            s, lineage = sequences[place], candidates.lineages[place]
            first = s.num_tokens + len(lineage) - (end - begin)
            segments.append(Segment(s.row, first, tokens[begin:end], end - begin, lineage))
            positions.append([s.num_tokens + depth for depth in depths[begin:end]])
            chosen.append(s)
        parents = candidates.parents[level].tolist()
        nodes = zip(level.places.tolist(), level.nodes.tolist(), parents, strict=True)
        named = [(sequences[place].id, node, parent) for place, node, parent in nodes]
        logits = self._forward(segments, named)
        self._spent = self._spent.plus(num_forwards=1)
        return self._children(logits, chosen, positions)

    def _forward(self, segments: list[Segment], nodes: list[tuple[int, int, int]]) -> torch.Tensor:
        """Logits of a pass over drafts: (request, node, parent) each, in their order."""
        return self._runner.forward(segments)

    def _children(
        self, logits: torch.Tensor, sequences: list[Sequence], positions: list[list[int]]
    ) -> Children:
        """What may follow, by row of the logits: each sequence has one per position."""
        tokens, sure = self._draw(logits, sequences, positions)
        return Children.of(tokens[:, None], sure[:, None])

    def _feed(self, sequences: list[Sequence], segments: list[Segment]) -> torch.Tensor:
        """Logits of a pass over known tokens, a segment per sequence."""
        return self._runner.forward(segments)

    def _first_drafts(self, sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """The first draft of each and its confidence, [B]: as it was looked at, or run now."""
        new = [sequence for sequence in sequences if sequence.id not in self._first]
        if new:
            opened = self._open(new).rows()
            self._first.update(zip([s.id for s in new], opened, strict=True))
        first = Children.stack([self._first[sequence.id] for sequence in sequences])
        device = self._runner.device
        tokens = torch.from_numpy(first.tokens[:, 0]).to(device)
        return tokens, torch.from_numpy(first.confidences[:, 0]).to(device)

    def _begin(self, sequences: list[Sequence]) -> torch.Tensor:
        """Logits of the first draft, [B, vocabulary], after all that is known of each."""
        self._catch_up(sequences)
        logits = self._feed(sequences, [self._unseen(s) for s in sequences])
        self._spent = self._spent.plus(num_forwards=1)
        for sequence in sequences:
            self._num_computed[sequence.id] = sequence.num_tokens
        return logits

    def _draw(
        self, logits: torch.Tensor, sequences: list[Sequence], positions: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A draft by row, and the probability that the draft model gives it, both [M]."""
        draws = self._draws(sequences, positions)
        tokens, wide = sample(logits, draws), logits.float()
        return tokens, (wide.gather(-1, tokens[:, None])[:, 0] - wide.logsumexp(-1)).exp()

    def _draws(self, sequences: list[Sequence], positions: list[list[int]]) -> Draws:
        self._spent = self._spent.plus(num_draft_tokens=sum(map(len, positions)))
        asked = zip(sequences, positions, strict=True)
        return Draws.of((s.request.sampling, s.seed, places) for s, places in asked)

    def accepted(self, sequences: list[Sequence], paths: list[list[int]]) -> None:
        kept = []
        said: list[list[int]] = (
            [[] for _ in range(self._candidates.size)] if self._candidates else []
        )
        for sequence, path in zip(sequences, paths, strict=True):
            drafts = self._drafts.get(sequence.id)
            if drafts is None:
                continue
            said[drafts.place] = sequence.tokens[drafts.num_tokens :]
            if slots := [drafts.slots[node] for node in path if drafts.slots[node] != NONE]:
                kept.append((sequence, drafts.num_tokens, slots))
        if self._candidates is not None:
            self._candidates.learn(said)
        self._keep(kept)

    def _keep(self, kept: list[tuple[Sequence, int, list[int]]]) -> None:
        """Accepted drafts are in the cache too: (request, tokens known before, slots of them)."""
        self._runner.cache.compact((s.row, start, slots) for s, start, slots in kept)
        for sequence, _, slots in kept:
            self._num_computed[sequence.id] += len(slots)

    def forget(self, sequence: Sequence) -> None:
        self._num_computed.pop(sequence.id, None)
        self._waited.pop(sequence.id, None)
        self._first.pop(sequence.id, None)
        self._drafts.pop(sequence.id, None)
        self._goes_on.discard(sequence.id)

    def _unseen(self, sequence: Sequence) -> Segment:
        start = self._num_computed.get(sequence.id, 0)
        return Segment(sequence.row, start, sequence.tokens[start:], 1)

    def _catch_up(self, sequences: list[Sequence]) -> None:
        """Feed what was missed, but for the pass that drafts.

        Passes are filled to `max_pass_tokens`; what is left at the end, a few tokens per request,
        goes with the first drafting pass.
        """
        lag = {s.id: s.num_tokens - self._num_computed.get(s.id, 0) - 1 for s in sequences}
        left = sum(lag.values())
        self._spent = self._spent.plus(num_catch_up_tokens=left)
        while left > self._max_pass_tokens:
            room = self._max_pass_tokens
            segments = []
            fed = []
            for sequence in sequences:
                if (size := min(room, lag[sequence.id])) > 0:
                    start = self._num_computed.get(sequence.id, 0)
                    tokens = sequence.tokens[start : start + size]
                    segments.append(Segment(sequence.row, start, tokens, 0))
                    fed.append(sequence)
                    self._num_computed[sequence.id] = start + size
                    lag[sequence.id] -= size
                    room -= size
            self._feed(fed, segments)
            self._spent = self._spent.plus(num_forwards=1)
            left = sum(lag.values())
