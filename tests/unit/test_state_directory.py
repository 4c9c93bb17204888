"""Checkpoints as files: whole or not at all, refused ones kept aside, the oldest pruned."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from learned_state import CHECKPOINT, ENGINE, FRAME

from smartspec.daemon import config
from smartspec.daemon.event_bus import CheckpointEvent, NoteEvent
from smartspec.daemon.state import warm_start
from smartspec.daemon.state.learned import encode
from smartspec.daemon.state.state_directory import STALE_S, StateDirectory
from smartspec.daemon.telemetry.checkpoint_writer import CheckpointWriter
from smartspec.daemon.views import stored_state
from smartspec.engine_adapter.messages import Fingerprint

KEY = ENGINE.key.id


def frame_of(target: str) -> tuple[str, bytes]:
    fingerprint = Fingerprint(target=target, proposer="lookup")
    key = msgspec.structs.replace(CHECKPOINT.key, fingerprint=fingerprint)
    return key.id, encode(msgspec.structs.replace(CHECKPOINT, key=key))


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_checkpoint_comes_back_when_written(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path / "a" / "b")
    assert directory.load() == []
    directory.write(KEY, FRAME)
    (stored,) = directory.load()
    assert stored.checkpoint == CHECKPOINT and stored.key_id == KEY
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(stored.path.stat().st_mode) == 0o600


def test_older_file_stays_whole_when_the_disk_is_full(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    directory.write(KEY, FRAME)
    with full_disk(), pytest.raises(OSError, match="large"):
        directory.write(KEY, FRAME)
    (stored,) = directory.load()
    assert stored.checkpoint == CHECKPOINT
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY}.state"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (FRAME[:-7], "damaged or cut short"),
        (b"", "damaged or cut short"),
        (bytes([*FRAME[:-1], FRAME[-1] ^ 1]), "digest"),
        (msgspec.msgpack.encode(msgspec.msgpack.decode(FRAME) | {"version": 7}), "newer release"),
        (frame_of("another")[1], "of another fingerprint"),
    ],
)
def test_file_is_kept_aside_when_refused(tmp_path: Path, content: bytes, why: str) -> None:
    directory = StateDirectory(tmp_path)
    for number in range(2):
        (tmp_path / f"{KEY}.state").write_bytes(content)
        (stored,) = directory.load()
        assert stored.checkpoint is None and why in stored.why_not
        suffix = ".refused.2" if number else ".refused"
        assert stored.path.name == f"{KEY}.state{suffix}"
        assert stored.path.read_bytes() == content
    assert directory.load() == []
    assert len(directory.entries()) == 2


def test_what_is_no_file_of_ours_is_refused_or_left_alone(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    os.mkfifo(tmp_path / f"{KEY}.state")  # reading it would wait for ever
    (tmp_path / "notes.txt").write_text("mine")
    (stored,) = directory.load()
    assert stored.why_not == "not a regular file"
    assert (tmp_path / "notes.txt").exists()
    with pytest.raises(ValueError, match="not the name"):
        directory.write("../elsewhere", FRAME)


def test_oldest_files_are_pruned_but_refused_ones_never(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path, max_kept=2)
    (tmp_path / f"{KEY}.state").write_bytes(b"")
    directory.load()
    names = []
    for at, target in enumerate(("a", "b", "c")):
        key_id, frame = frame_of(target)
        directory.write(key_id, frame)
        os.utime(tmp_path / f"{key_id}.state", (1e9 + at, 1e9 + at))
        names.append(key_id)
    directory.write(*frame_of("c"))
    kept = {path.name.partition(".")[0] for path in tmp_path.iterdir()}
    assert kept == {names[1], names[2], KEY}


def test_unfinished_files_are_removed_when_abandoned(tmp_path: Path) -> None:
    old, new = tmp_path / ".a.1.partial", tmp_path / ".b.2.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    StateDirectory(tmp_path).load()
    assert STALE_S < 1e9
    assert new.exists() and not old.exists()


# -- the writer -----------------------------------------------------------------------------------


def test_failure_is_told_once_and_made_up_for_when_the_disk_is_back(tmp_path: Path) -> None:
    notes: list[NoteEvent] = []
    writer = CheckpointWriter(StateDirectory(tmp_path), notes.append)
    with full_disk():
        for _ in range(3):
            writer.add(CheckpointEvent(key_id=KEY, frame=FRAME))
            writer.flush()
    assert [note.kind for note in notes] == ["state_unsaved"]
    assert "state.directory" in notes[0].text
    writer.flush()  # nothing new has come: what failed has waited
    assert [note.kind for note in notes] == ["state_unsaved", "state_saved"]
    assert (writer.num_written, writer.num_failures) == (1, 3)
    assert len(StateDirectory(tmp_path).load()) == 1


def test_what_waits_is_written_when_the_writer_is_closed(tmp_path: Path) -> None:
    writer = CheckpointWriter(StateDirectory(tmp_path))
    writer.start()
    for target in ("a", "b", "c"):
        key_id, frame = frame_of(target)
        writer.add(CheckpointEvent(key_id=key_id, frame=frame))
    writer.close()
    assert len(StateDirectory(tmp_path).load()) == 3


# -- at start, and for people ---------------------------------------------------------------------


def settings_for(path: Path, enabled: bool = True) -> config.Settings:
    return config.load(env={}, overrides={"state.directory": str(path), "state.enabled": enabled})


def test_start_is_cold_and_says_so_when_the_directory_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert len(warm_start.load(settings_for(file))) == 0
    assert "state.directory" in caplog.text
    assert stored_state.run(settings_for(file)) == stored_state.EXIT_UNREADABLE


def test_library_holds_what_is_stored_and_what_was_refused(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    directory.write(KEY, FRAME)
    (tmp_path / f"{frame_of('b')[0]}.state").write_bytes(FRAME)
    library = warm_start.load(settings_for(tmp_path))
    assert (len(library), library.num_refused) == (1, 1)
    assert library.find(ENGINE.key) is not None
    assert len(warm_start.load(settings_for(tmp_path, enabled=False))) == 0


def test_state_command_lists_what_is_stored_and_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(tmp_path)
    assert stored_state.run(settings) == 0
    assert "nothing is stored" in capsys.readouterr().out
    StateDirectory(tmp_path).write(KEY, FRAME)
    (tmp_path / f"{frame_of('b')[0]}.state.refused").write_bytes(b"?")
    assert stored_state.run(settings, as_json=True, wall=lambda: 1e9 + 60) == 0
    good, bad = msgspec.json.decode(capsys.readouterr().out)["files"]
    assert good["age_s"] == 60.0 and good["fingerprint"]["target"] == "scripted"
    assert good["why_not"] is None and good["num_steps"] == 150
    assert "cut short" in bad["why_not"]
    assert stored_state.run(settings) == 0
    assert "refused" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".state", ".refused"}
