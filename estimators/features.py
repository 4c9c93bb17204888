"""Which features make the buckets of the acceptance table, and where they are cut.

Coarse on purpose: every bucket must see enough drafts to be learned within minutes. What the
request's own last drafts did is not among them: one unlucky step would put a good request where
nothing is drafted for, so that it never left (measured: 419 against 487 tok/s on a mixed batch);
its correction says the same and comes back.
"""

from __future__ import annotations

BUCKET_EDGES: dict[str, tuple[float, ...]] = {
    # tokens that prompt lookup matched
    "match_length": (3.0, 5.0, 8.0),
}
