"""The doctor on real hosts, well and unwell."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import live_daemon
import pytest
from fakes import PATIENCE_S, free_port
from typer.testing import CliRunner

from smartspec.daemon import cli, config
from smartspec.daemon.admission import curve_keys
from smartspec.daemon.config import Settings
from smartspec.daemon.event_bus import LoopEvent
from smartspec.daemon.telemetry.engine_state import EngineState
from smartspec.daemon.views import doctor
from smartspec.daemon.views.doctor import Finding
from smartspec.daemon.views.inspect import PastEvent, View

pytestmark = pytest.mark.system


@pytest.fixture
def folder() -> Iterator[str]:
    with live_daemon.folder() as path:
        yield path


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    """The worst finding of each check."""
    rank = ("ok", "warning", "failed").index
    return {f.check: f for f in sorted(findings, key=lambda finding: rank(finding.state))}


def settings_in(folder: str, **more: Any) -> Settings:
    return config.load(None, {}, {"runtime_dir": folder, "state.enabled": False, **more})


def test_all_is_well_when_daemon_and_engine_work(folder: str) -> None:
    with live_daemon.daemon(folder) as (settings, process), live_daemon.engine(settings):
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = by_check(list(doctor.examine(settings, "gpu0")))
            if all(one.state == "ok" for one in found.values()):
                break
            assert time.monotonic() < deadline, found
        assert {
            "runtime_dir",
            "endpoint",
            "daemon",
            "deciding",
            "redis",
            "telemetry",
        } <= found.keys()
        assert "Valkey" in found["redis"].text
        assert "steering" in found["engine gpu0"].text
        assert "decisions for" in found["deciding"].text
        command = [sys.executable, "-m", "smartspec.daemon.cli", "doctor", "--json"]
        command += ["--runtime-dir", folder, "--set", "telemetry.prometheus_port=0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stdout
        assert json.loads(done.stdout)["ok"] is True
        # A loop that is stuck is told from one that is gone.
        process.send_signal(signal.SIGSTOP)
        try:
            (finding,) = doctor.check_daemon(settings, listen_s=1.5)
        finally:
            process.send_signal(signal.SIGCONT)
        assert f"process {process.pid} is there and does not turn" in finding.text
        process.kill()
        process.wait()
    found = by_check(
        [*doctor.check_daemon(settings, listen_s=0.2), *doctor.check_endpoint(settings)]
    )
    assert "is gone" in found["daemon"].text
    assert "left over" in found["endpoint"].text


def test_every_finding_says_what_to_do_when_nothing_is_there(folder: str) -> None:
    settings = settings_in(f"{folder}/none")
    found = [*doctor.check_runtime_dir(settings), *doctor.check_endpoint(settings)]
    found += [*doctor.check_daemon(settings, listen_s=0.1), *doctor.check_redis(settings)]
    found += doctor.check_prometheus(settings, None)
    assert {one.check for one in found} == {
        "runtime_dir",
        "endpoint",
        "daemon",
        "redis",
        "prometheus",
    }
    assert all(one.state != "ok" and one.advice for one in found)


def test_telemetry_that_was_started_apart_is_found(folder: str) -> None:
    """As smartspec-telemetry.service starts it; and another daemon's metrics are told as such."""
    apart = {"telemetry__enabled": False, "telemetry__prometheus_port": free_port()}
    with live_daemon.daemon(folder, **apart) as (settings, _):
        alone = by_check(list(doctor.examine(settings)))
        assert alone["redis"].state == "warning" and "there is none" in alone["redis"].text
        assert "prometheus" not in alone, "none was wanted"
        port = f"telemetry.prometheus_port={settings.telemetry.prometheus_port}"
        command = [sys.executable, "-m", "smartspec.daemon.cli", "telemetry"]
        telemetry = subprocess.Popen([*command, "--runtime-dir", folder, "--set", port])
        try:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                found = by_check(list(doctor.examine(settings)))
                states = [
                    found[name].state
                    for name in ("redis", "telemetry", "prometheus")
                    if name in found
                ]
                if states == ["ok"] * 3:
                    break
                assert time.monotonic() < deadline, found
            other = LoopEvent(started_s=time.time())
            assert not [*doctor.check_prometheus(settings, other)]
            wanting = config.replace(settings, {"telemetry.enabled": True})
            (finding,) = doctor.check_prometheus(wanting, other)
            assert finding.state == "warning" and "shows another daemon" in finding.text
        finally:
            telemetry.terminate()
            telemetry.wait(PATIENCE_S)


def test_exit_code_tells_scripts(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LISTEN_S", 0.1)
    options = ["doctor", "--runtime-dir", f"{folder}/none"]
    result = CliRunner().invoke(cli.app, options)
    assert result.exit_code == doctor.EXIT_FAILED
    assert "-> start the daemon" in result.output
    as_json = CliRunner().invoke(cli.app, [*options, "--json"])
    assert as_json.exit_code == doctor.EXIT_FAILED
    content = json.loads(as_json.output)
    assert content["ok"] is False
    assert content["findings"][0]["check"] == "runtime_dir"


def test_sockets_open_to_all_are_found(folder: str) -> None:
    import socket

    settings = settings_in(folder)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{folder}/engines.sock")
        listening.listen()
        for mode, state in ((0o666, "failed"), (0o660, "ok")):
            Path(f"{folder}/engines.sock").chmod(mode)
            (finding,) = doctor.check_endpoint(settings)
            assert finding.state == state, finding
    Path(folder).chmod(0o777)
    (finding,) = doctor.check_runtime_dir(settings)
    assert "chmod o-w" in finding.advice


def test_keys_are_examined_without_being_shown(folder: str) -> None:
    directory = Path(folder) / "keys"
    settings = settings_in(
        folder, **{"curve.directory": str(directory), "endpoint": "tcp://127.0.0.1:1"}
    )
    (missing,) = doctor.check_keys(settings)
    assert "smartspec keys make" in missing.text
    curve_keys.make(directory)
    (empty,) = doctor.check_keys(settings)
    assert "smartspec keys add" in empty.advice
    curve_keys.add(directory, "gpu0")
    (fine,) = doctor.check_keys(settings)
    assert fine.state == "ok"
    assert (directory / curve_keys.SECRET).read_text().strip() not in repr(fine)
    (directory / curve_keys.SECRET).chmod(0o644)
    (open_to_all,) = doctor.check_keys(settings)
    assert open_to_all.state == "failed" and "chmod 600" in open_to_all.text
    (closed,) = doctor.check_endpoint(settings)
    assert closed.state == "failed"


def view(told: str = "", **more: Any) -> View:
    state = EngineState(engine="a", **{"steering": True, "source": "policy", **more})
    events = [PastEvent(t_s=1.0, type="note", text=told)] if told else []
    return View(state=state, age_s=0.5, daemon_age_s=0.5, events=events)


@pytest.mark.parametrize(
    ("shown", "state", "part"),
    [
        (view(), "ok", "steering"),
        (view(steering=False, source="own"), "ok", "observing"),
        (view(source="fallback"), "failed", "chose by 'fallback'"),
        (view(staleness_steps=9), "warning", "9 steps old"),
        (view(prediction_error=0.5), "warning", "mispredicted by 50%"),
        (view(state="lost"), "warning", "lost"),
        (
            view("num_accepted: more than drafted", state="quarantined"),
            "failed",
            "num_accepted: more than drafted",
        ),
    ],
)
def test_engines_are_judged_by_their_last_steps(shown: View, state: str, part: str) -> None:
    (finding,) = doctor.check_engine(shown)
    assert finding.state == state
    assert part in finding.text
    assert bool(finding.advice) == (state != "ok")
