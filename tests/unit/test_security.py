"""Claims of docs/security.md each name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path


def test_every_claim_names_a_test_that_exists(repository: Path) -> None:
    text = (repository / "docs" / "security.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 12
    files = {
        path.name: path.read_text("utf-8") for path in (repository / "tests").rglob("test_*.py")
    }
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", row)
        assert named or "`make audit`" in row, row
        for file, test in named:
            assert f"def {test}(" in files[file] if test else file in files, (file, test)
