"""A small language model that drafts for a large one, token after token, for the whole batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from smartspec.engine_adapter.base import (
    F32,
    FEATURE_DRAFT_CONFIDENCE,
    FEATURE_TOKEN_ACCEPTANCE,
)
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.reference.calibration import (
    NUM_BANDS,
    Calibration,
    temperature_bands,
)
from smartspec.engine_adapter.reference.chain_growth import ChainGrowth
from smartspec.engine_adapter.reference.draft_tree import DraftTree, outcomes
from smartspec.engine_adapter.reference.kv_cache import KvCache
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.proposer import Availability, Proposal
from smartspec.engine_adapter.reference.sampling import Draws, sample
from smartspec.engine_adapter.reference.sequence import Sequence
from smartspec.engine_adapter.token_acceptance import TokenAcceptance

NOT_DRAFTED = -1.0  #: confidence of a request whose first draft is not known


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


class DraftModel:
    """Drafts with a model that shares the target's vocabulary, and its noise when sampling.

    Its KV cache is kept in step lazily: what it has not seen yet (the prompt, tokens decoded at
    length 0, the target's own token after a rejection) is fed when a request is next drafted for,
    and counted as catch-up. A rejection only moves the mark back: later tokens overwrite.

    Requests that were drafted for in the last step have their first draft run before lengths are
    chosen, so that its confidence can tell how far to go. Then k drafts take k - 1 more passes;
    the next step's first is the k-th. Where lengths are left to the confidences (`propose_at`), who
    is looked at is decided in the step before, at its prices.

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
        self._rates = TokenAcceptance()
        self._calibration = Calibration(num_bands=NUM_BANDS)
        self._num_fed: dict[int, int] = {}  # of the last drafts, how many are in it too
        self._verified: dict[int, tuple[DraftTree, list[float]]] = {}  # and confidences
        self._goes_on: set[int] = set()  # whose first draft is run before lengths are chosen
        self._first: dict[int, tuple[int, float]] = {}  # these, and their confidences
        self._luck = np.random.default_rng(0)  # of what is told of drafts that are not verified
        self._spent = Spent()  # in this step

    def available(self, sequences: list[Sequence]) -> Availability:
        """Runs the first draft of those who were drafted for last: lengths are chosen knowing it.

        The pass is not lost as long as they go on being drafted for: `propose` goes on from it.
        """
        self._spent = Spent()
        confidence = np.full(len(sequences), NOT_DRAFTED, np.float32)
        goes_on = [i for i, s in enumerate(sequences) if s.id in self._goes_on]
        self._first = {}
        if goes_on:
            confidence[goes_on] = self._look([sequences[i] for i in goes_on])
        ceiling = np.full(len(sequences), self.max_length, np.uint8)
        rates = self._rates.rates([s.tokens[-1] for s in sequences])
        return Availability(ceiling, np.stack((rates, confidence)))

    def _look(self, sequences: list[Sequence]) -> F32:
        """Run the first draft of each; how sure the draft model is of it, [B]."""
        tokens, confidence = self._draw(self._begin(sequences), sequences, 0)
        sure: F32 = confidence.cpu().numpy()
        ids = [sequence.id for sequence in sequences]
        self._first = dict(zip(ids, zip(tokens.tolist(), sure.tolist(), strict=True), strict=True))
        return sure

    def propose(self, sequences: list[Sequence], lengths: npt.NDArray[np.int64]) -> Proposal:
        return self._propose(sequences, lengths, None)

    def propose_at(
        self, sequences: list[Sequence], lengths: npt.NDArray[np.int64], prices: Prices
    ) -> Proposal:
        bands = temperature_bands(s.request.sampling for s in sequences)
        growth = ChainGrowth(prices, self._calibration, bands, lengths)
        proposal = self._propose(sequences, lengths, growth)
        # Whose first draft will be looked at in the next step: as far as these prices tell.
        paying = growth.next_step()
        self._goes_on = {s.id for s, pays in zip(sequences, paying, strict=True) if pays}
        cut = growth.cut(self._luck.random(len(sequences)))
        sizes = cut.num_verified.tolist()
        drafts = [tree.first(n) for tree, n in zip(proposal.drafts, sizes, strict=True)]
        for sequence, tree in zip(sequences, drafts, strict=True):
            self._verified[sequence.id] = (tree, self._verified[sequence.id][1])
        return proposal._replace(drafts=drafts, cut=cut)

    def _propose(
        self, sequences: list[Sequence], lengths: npt.NDArray[np.int64], growth: ChainGrowth | None
    ) -> Proposal:
        """Chains of these lengths; with ``growth`` as far as it says that they pay."""
        active = lengths > 0
        if growth is not None:
            known = np.array([s.id in self._first for s in sequences], np.bool_)
            active = (active & known) | growth.who_pays(active & ~known)
        self._goes_on = {s.id for s, drafted in zip(sequences, active, strict=True) if drafted}
        self._num_fed = dict.fromkeys(self._goes_on, 0)
        passes: list[tuple[npt.NDArray[np.intp], torch.Tensor, torch.Tensor]] = []
        while active.any():
            rows, depth = np.flatnonzero(active), len(passes)
            chosen = [sequences[i] for i in rows]
            if depth == 0:
                tokens, confidence = self._first_drafts(chosen)
            else:
                before, last, _ = passes[-1]
                stayed = torch.from_numpy(np.flatnonzero(np.isin(before, rows)))
                fresh = last[stayed.to(last.device)]
                segments = [Segment(s.row, s.num_tokens + depth - 1, [0], 1) for s in chosen]
                logits = self._go_on(chosen, segments, fresh)
                tokens, confidence = self._draw(logits, chosen, depth)
                self._spent = self._spent.plus(num_forwards=1)
                for sequence in chosen:
                    self._num_fed[sequence.id] = depth
            passes.append((rows, tokens, confidence))
            active = active & (lengths > depth + 1)
            if growth is not None:
                growth.add(rows, confidence.cpu().numpy())
                active = growth.who_pays(active)
        drafts: list[list[int]] = [[] for _ in sequences]
        sure: list[list[float]] = [[] for _ in sequences]
        if passes:
            places, drawn, confident = zip(*passes, strict=True)
            for row, token, chance in zip(
                np.concatenate(places).tolist(),
                torch.cat(drawn).tolist(),
                torch.cat(confident).tolist(),
                strict=True,
            ):
                drafts[row].append(token)
                sure[row].append(chance)
        chains = [DraftTree.chain(draft) for draft in drafts]
        ids = [sequence.id for sequence in sequences]
        self._verified = dict(zip(ids, zip(chains, sure, strict=True), strict=True))
        return Proposal(chains, *self._spent)

    def _feed(self, sequences: list[Sequence], segments: list[Segment]) -> torch.Tensor:
        """Logits of a pass over known tokens, a segment per sequence."""
        return self._runner.forward(segments)

    def _go_on(
        self, sequences: list[Sequence], segments: list[Segment], fresh: torch.Tensor
    ) -> torch.Tensor:
        """Logits after the latest draft of each sequence, ``fresh``."""
        return self._runner.forward(segments, fresh)

    def _num_kept(self, num_fed: int) -> int:
        """Of accepted drafts that were fed: how many the cache holds as if they had been known."""
        return num_fed

    def _first_drafts(self, sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """The first draft of each and its confidence, [B]: as it was looked at, or run now."""
        known = [self._first.get(sequence.id, (-1, 0.0)) for sequence in sequences]
        first = torch.tensor([token for token, _ in known], device=self._runner.device)
        confidence = torch.tensor([sure for _, sure in known], device=self._runner.device)
        new = [i for i, (token, _) in enumerate(known) if token < 0]
        if new:
            chosen = [sequences[i] for i in new]
            first[new], confidence[new] = self._draw(self._begin(chosen), chosen, 0)
        return first, confidence

    def _begin(self, sequences: list[Sequence]) -> torch.Tensor:
        """Logits of the first draft, [B, vocabulary], after all that is known of each."""
        self._catch_up(sequences)
        logits = self._feed(sequences, [self._unseen(s) for s in sequences])
        self._spent = self._spent.plus(num_forwards=1)
        for sequence in sequences:
            self._num_computed[sequence.id] = sequence.num_tokens
        return logits

    def _draw(
        self, logits: torch.Tensor, sequences: list[Sequence], depth: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A draft of each, and the probability that the draft model gives it, both [B]."""
        self._spent = self._spent.plus(num_draft_tokens=len(sequences))
        places = [range(s.num_tokens + depth, s.num_tokens + depth + 1) for s in sequences]
        asked = zip(sequences, places, strict=True)
        draws = Draws.of((s.request.sampling, s.seed, place) for s, place in asked)
        tokens, wide = sample(logits, draws), logits.float()
        return tokens, (wide.gather(-1, tokens[:, None])[:, 0] - wide.logsumexp(-1)).exp()

    def accepted(self, sequences: list[Sequence], paths: list[list[int]]) -> None:
        before: list[int] = []
        outcome: list[bool] = []
        bands = temperature_bands(s.request.sampling for s in sequences).tolist()
        for sequence, path, band in zip(sequences, paths, bands, strict=True):
            if sequence.id in self._num_fed:
                tree, confidences = self._verified[sequence.id]
                self._calibration.learn(tree, confidences, path, band)
                start = self._num_computed[sequence.id]  # tokens before its drafts
                tried, right = outcomes(tree, path, sequence.tokens, start)
                before += tried
                outcome += right
                num_fed = min(len(path), self._num_fed[sequence.id])
                self._num_computed[sequence.id] += self._num_kept(num_fed)
        self._rates.learn(before, outcome)

    def forget(self, sequence: Sequence) -> None:
        self._num_computed.pop(sequence.id, None)
        self._first.pop(sequence.id, None)
        self._num_fed.pop(sequence.id, None)
        self._verified.pop(sequence.id, None)
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
