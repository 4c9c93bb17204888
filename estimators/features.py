"""Which features make the buckets of the acceptance table, and where they are cut.

Coarse on purpose: every bucket must see enough drafts to be learned within minutes.
"""

from __future__ import annotations

BUCKET_EDGES: dict[str, tuple[float, ...]] = {
    # accepted / drafted of the request's last drafted step (-1: never drafted for):
    # never | none or few | some | all
    "last_accepted_share": (-0.5, 0.34, 0.99),
    # tokens that prompt lookup matched
    "match_length": (3.0, 5.0, 8.0),
}
