"""Fetches public traces and prompts by commit and SHA-256: ``make data``, for those with network.

Into ``$SMARTSPEC_DATA``, by default ``build/data``. A file that is there and right stays; one that
comes out otherwise than expected is not kept.
"""

from __future__ import annotations

import hashlib
import os
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

HOST = "https://raw.githubusercontent.com"
TIMEOUT_S = 60.0


class PublicFile(NamedTuple):
    """One file of a repository at a commit."""

    name: str  #: under the folder of data
    repository: str
    commit: str
    path: str
    sha256: str
    licence: str

    @property
    def url(self) -> str:
        return f"{HOST}/{self.repository}/{self.commit}/{self.path}"


FILES = (
    PublicFile(
        "traces/azure2023_conv.csv",
        "Azure/AzurePublicDataset",
        "b469a113cedc",
        "data/AzureLLMInferenceTrace_conv.csv",
        "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        "CC-BY-4.0",
    ),
    PublicFile(
        "traces/mooncake_synthetic_trace.jsonl",
        "kvcache-ai/Mooncake",
        "3b5a59413395",
        "FAST25-release/traces/synthetic_trace.jsonl",
        "bd070915a98fc0ed264d7cfef2ce746002eb3076a695ec31ba2674c0111ec131",
        "Apache-2.0",
    ),
    PublicFile(
        "prompts/spec_bench_question.jsonl",
        "hemingkx/Spec-Bench",
        "fd2c1cd7d220",
        "data/spec_bench/question.jsonl",
        "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04",
        "Apache-2.0",
    ),
)


def download(url: str) -> bytes:
    """Raises OSError."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        content: bytes = answer.read()
    return content


def fetch(
    folder: Path,
    files: Sequence[PublicFile] = FILES,
    get: Callable[[str], bytes] = download,
    say: Callable[[str], None] = print,
) -> int:
    """Fetch what is missing; returns how many could not be had."""
    num_failed = 0
    for file in files:
        path = folder / file.name
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256:
            say(f"{file.name}: there")
            continue
        try:
            content = get(file.url)
            found = hashlib.sha256(content).hexdigest()
            if found != file.sha256:
                raise OSError(f"SHA-256 is {found}, expected {file.sha256}")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            num_failed += 1
            say(f"{file.name}: not fetched from {file.url}: {error}")
        else:
            say(f"{file.name}: fetched ({file.repository}, {file.licence})")
    return num_failed


def data_folder() -> Path:
    """Where public data lie: ``$SMARTSPEC_DATA``, or ``build/data`` under the working directory."""
    return Path(os.environ.get("SMARTSPEC_DATA") or "build/data")


def main() -> None:
    """Entry point of ``python -m smartspec.lab.public_data``."""
    folder = data_folder()
    num_failed = fetch(folder)
    print(f"export SMARTSPEC_DATA={folder.resolve()}")
    sys.exit(1 if num_failed else 0)


if __name__ == "__main__":
    main()
