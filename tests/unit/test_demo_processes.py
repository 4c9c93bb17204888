"""The demonstration's processes: watched, and never left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from smartspec.lab.demo.processes import DaemonProcess, Process, ProcessFailed, WorkerProcess


def test_last_words_are_reported_when_a_process_ends(tmp_path: Path) -> None:
    process = Process("worker", ["worker", "--max-length", "many"], tmp_path / "log")
    process.popen.wait(30)
    with pytest.raises(ProcessFailed, match="the worker ended with exit code 2") as caught:
        process.check()
    assert "--max-length" in str(caught.value)
    assert str(tmp_path / "log") in str(caught.value)
    process.stop()


def test_worker_failure_is_raised_when_waiting_for_it(tmp_path: Path) -> None:
    worker = WorkerProcess(["--max-length", "many"], tmp_path / "log")
    try:
        with pytest.raises(ProcessFailed, match="exit code 2"):
            worker.wait_ready(lambda so_far_s, progress: None)
        with pytest.raises(ProcessFailed, match="exit code 2"):
            worker.set_speculation("smartspec")
    finally:
        worker.stop()


def test_signal_is_named_when_a_process_is_killed(tmp_path: Path) -> None:
    process = Process("daemon", ["run", "--runtime-dir", str(tmp_path / "run")], tmp_path / "log")
    process.popen.kill()
    process.popen.wait(10)
    with pytest.raises(ProcessFailed, match="was killed by SIGKILL"):
        process.check()
    process.stop()


def test_progress_bar_counts_as_its_last_state_when_the_tail_is_read(tmp_path: Path) -> None:
    process = Process("worker", ["--version"], tmp_path / "log")
    process.popen.wait(30)
    (tmp_path / "log").write_bytes(b"fetching\r 10%\r 20%\r 30%")
    assert process.tail(1) == " 30%"
    process.stop()


def test_settings_of_another_daemon_are_left_out_when_a_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMARTSPEC_CONTROL_TTL_S", "not a number")
    process = Process("daemon", ["config", "check"], tmp_path / "log")
    assert process.popen.wait(30) == 0
    process.stop()


@pytest.mark.system
def test_daemon_is_gone_when_stopped(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "run", tmp_path / "log")
    try:
        daemon.wait_ready()
        pid = daemon.process.popen.pid
    finally:
        began = time.monotonic()
        daemon.stop()
    assert daemon.process.popen.returncode == 0
    assert time.monotonic() - began < 10
    assert not Path(f"/proc/{pid}").exists()
    assert processes_naming(str(tmp_path)) == []


def processes_naming(text: str) -> list[str]:
    """Command lines of other processes that name ``text``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if text in line:
                found.append(line)
    return found
