"""Which features make the buckets of the acceptance table, and where they are cut.

Coarse on purpose: some hundred buckets at most, of which the common ones are learned from their own
drafts and the rare ones through their digits (acceptance.py). What the request's own last drafts
did is not among them: one unlucky step would put a good request where nothing is drafted for, so
that it never left (measured: 419 against 487 tok/s on a mixed batch); its correction says the same
and comes back.
"""

from __future__ import annotations

BUCKET_EDGES: dict[str, tuple[float, ...]] = {
    # tokens that prompt lookup matched
    "match_length": (3.0, 4.0, 5.0, 6.0, 8.0),
    # how far earlier occurrences of the match agree on what comes next
    "match_agreement": (0.35, 0.5, 0.65, 0.8),
    # share of drafts accepted after the token that the request ends with
    "token_acceptance": (0.15, 0.3, 0.45, 0.6, 0.8),
    # the same of the second draft, given that the first is right
    "second_acceptance": (0.3, 0.5, 0.7),
    # probability that the draft model gives its first draft; below 0 where it is not known then
    "draft_confidence": (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7),
}
