"""Real vLLM: left out by `make test`, run by `make test-vllm`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import served


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM answers without speculation; with the file that the oracle drafts from."""
    folder = tmp_path_factory.mktemp("plain")
    told = served(folder / "told.json", "none", "own")
    sequences = [told["prompts"][name] + answer for name, [answer] in told["answers"].items()]
    told["sequences"] = folder / "sequences.json"
    told["sequences"].write_text(json.dumps(sequences))
    return told
