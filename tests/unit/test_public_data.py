"""What `make data` fetches is what was asked for, or it is not kept."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from smartspec.lab import public_data
from smartspec.lab.public_data import FILES, PublicFile

CONTENT = b"timestamp,input_tokens,output_tokens\n"
FILE = PublicFile(
    "traces/a.csv", "owner/name", "abc", "x/a.csv", hashlib.sha256(CONTENT).hexdigest(), "MIT"
)


def test_a_file_is_fetched_once_and_from_its_commit(tmp_path: Path) -> None:
    asked: list[str] = []

    def get(url: str) -> bytes:
        asked.append(url)
        return CONTENT

    said: list[str] = []
    for _ in range(2):
        assert public_data.fetch(tmp_path, [FILE], get, said.append) == 0
    assert asked == [FILE.url] and asked[0].endswith("/owner/name/abc/x/a.csv")
    assert (tmp_path / "traces" / "a.csv").read_bytes() == CONTENT
    assert "fetched" in said[0] and said[1].endswith("there")


def test_another_content_is_not_kept_and_an_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / FILE.name
    path.parent.mkdir()
    path.write_bytes(b"old")
    said: list[str] = []
    assert public_data.fetch(tmp_path, [FILE], lambda url: b"other", said.append) == 1
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["a.csv"]
    assert "SHA-256" in said[0]


def test_no_network_is_told_with_the_address(tmp_path: Path) -> None:
    def get(url: str) -> bytes:
        raise OSError("no route")

    said: list[str] = []
    assert public_data.fetch(tmp_path, [FILE], get, said.append) == 1
    assert FILE.url in said[0] and "no route" in said[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_listed_is_what_the_figures_were_made_with(
    file: PublicFile, data_dir: Path
) -> None:
    assert re.fullmatch(r"[0-9a-f]{12,40}", file.commit)
    assert hashlib.sha256((data_dir / file.name).read_bytes()).hexdigest() == file.sha256
