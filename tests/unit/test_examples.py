"""Examples say what they promise."""

from __future__ import annotations

import json
import re
from pathlib import Path


def test_table_of_the_vllm_example_names_every_length(repository: Path) -> None:
    script = (repository / "examples" / "vllm" / "serve.sh").read_text("utf-8")
    found = re.search(r"--speculative-config '({.*?\n    })'", script, re.DOTALL)
    assert found is not None
    speculation = json.loads(found[1])
    table = speculation["num_speculative_tokens_per_batch_size"]
    longest = speculation["num_speculative_tokens"]
    assert [length for _, _, length in table] == list(range(longest, -1, -1))
    # Without gaps, up to the largest batch.
    firsts = [first for first, _, _ in table]
    assert firsts == [1] + [last + 1 for _, last, _ in table[:-1]]
    assert f"--max-num-seqs {table[-1][1]} " in script
