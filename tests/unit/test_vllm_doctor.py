"""`smartspec doctor vllm`, where there is no vLLM; tests/vllm has it where there is."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from smartspec.daemon.views import doctor
from smartspec.engine_adapter.vllm import compatibility
from smartspec.engine_adapter.vllm.doctor import Finding, check_daemon, check_version


def test_python_without_vllm_is_told_so() -> None:
    found = list(doctor.examine_vllm(sys.executable))
    assert [(f.check, f.state) for f in found] == [("python", "ok"), ("vllm", "failed")]
    assert "--python" in found[-1].advice


@pytest.mark.parametrize(
    ("script", "check", "words"),
    [
        ("#!/bin/sh\necho 'No module named smartspec' >&2; exit 1\n", "smartspec", "pip install"),
        ("#!/bin/sh\necho '{\"check\": 1}'\n", "smartspec", "the same one"),
    ],
)
def test_python_that_cannot_tell_is_told_so(
    script: str, check: str, words: str, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(script)
    python.chmod(0o755)
    found = list(doctor.examine_vllm(str(python)))
    assert (found[-1].check, found[-1].state) == (check, "failed")
    assert words in found[-1].advice


def test_python_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    (found,) = doctor.examine_vllm(str(tmp_path / "none"))
    assert found.state == "failed" and "cannot be run" in found.text


def version_of(monkeypatch: pytest.MonkeyPatch, problems: list[str], version: str) -> list[Finding]:
    monkeypatch.setattr(compatibility, "problems", lambda: problems)
    return list(check_version(version))


def test_versions_are_judged_by_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    good = version_of(monkeypatch, [], f"{compatibility.TESTED[0]}+cpu")
    assert [f.state for f in good] == ["ok", "ok"] and "--scheduler-cls" in good[-1].text
    assert version_of(monkeypatch, [], "9.9.9")[0].state == "warning"
    (bad,) = version_of(monkeypatch, ["Scheduler.schedule reads no running"], "0.1.0")
    assert bad.state == "failed" and "reads no running" in bad.text


def test_daemon_is_looked_for_where_the_engine_would(tmp_path: Path) -> None:
    environment = {"SMARTSPEC_ENDPOINT": f"ipc://{tmp_path}/s"}
    (missing,) = check_daemon(environment)
    assert missing.state == "failed" and str(tmp_path) in missing.text
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/s")
        listener.listen()
        (found,) = check_daemon(environment)
        assert found.state == "ok"
    (wrong,) = check_daemon({"SMARTSPEC_ENDPOINT": "nowhere"})
    assert wrong.check == "settings"
