"""Manifests against Kubernetes' own schemas and against the code, and the sidecar's script alive.

Nothing here runs in a cluster, and no image is built: `Containerfile` is compared with the files
that it names, no more.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from smartspec.daemon import config
from smartspec.engine_adapter.vllm.settings import ENVIRONMENT

pytestmark = pytest.mark.integration

VERSIONS = ("1.29.0", kubernetes_validate.latest_version())


@pytest.fixture(scope="module")
def folder(repository: Path) -> Path:
    return repository / "kubernetes"


@pytest.fixture(scope="module")
def rendered(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k kubernetes/vllm` would send."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: manifests are not rendered")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder / "vllm")], capture_output=True, text=True, check=True
    )
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def pod(rendered: list[dict[str, Any]]) -> dict[str, Any]:
    (deployment,) = (one for one in rendered if one["kind"] == "Deployment")
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def container(pod: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (c for c in pod["containers"] + pod["initContainers"] if c["name"] == name)
    return dict(found)


def variables(of: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one.get("value", "") for one in of["env"]}


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_fit_the_schemas_of_kubernetes(
    rendered: list[dict[str, Any]], version: str
) -> None:
    assert {one["kind"] for one in rendered} == {"ConfigMap", "Deployment", "Service"}
    for one in rendered:
        kubernetes_validate.validate(one, version, strict=True)


def test_schema_check_can_fail(rendered: list[dict[str, Any]]) -> None:
    wrong = {**rendered[0], "misspelt": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def test_engine_connects_where_the_sidecar_listens(pod: dict[str, Any]) -> None:
    engine, sidecar = container(pod, "vllm"), container(pod, "smartspec")
    given = variables(sidecar)
    settings = config.load(env={n: v for n, v in given.items() if n.startswith("SMARTSPEC_")})
    assert variables(engine)[ENVIRONMENT["endpoint"]] == settings.endpoint
    assert ENVIRONMENT["engine"] in variables(engine)  # two pods must not have one name
    for one in (engine, sidecar):
        (mount,) = (m for m in one["volumeMounts"] if m["name"] == "smartspec-run")
        assert settings.runtime_dir.startswith(mount["mountPath"] + "/")


def test_every_mount_has_a_volume(pod: dict[str, Any]) -> None:
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounted = {
        mount["name"]
        for one in pod["containers"] + pod["initContainers"]
        for mount in one["volumeMounts"]
    }
    assert mounted == volumes


def test_scrapes_reach_the_exporter(
    pod: dict[str, Any], rendered: list[dict[str, Any]], tmp_path: Path
) -> None:
    (given,) = (one["data"] for one in rendered if one["kind"] == "ConfigMap")
    (tmp_path / "smartspec.toml").write_text(given["smartspec.toml"], "utf-8")
    settings = config.load(tmp_path / "smartspec.toml", env={})
    sidecar = container(pod, "smartspec")
    (port,) = sidecar["ports"]
    assert port["containerPort"] == settings.telemetry.prometheus_port
    assert settings.telemetry.prometheus_address == "0.0.0.0"


def test_engine_is_ready_whatever_becomes_of_the_daemon(pod: dict[str, Any]) -> None:
    """A probe that fails makes the pod unready, or has the container killed, which does so too."""
    assert not {name for name in container(pod, "smartspec") if name.endswith("Probe")}


def test_commands_in_the_sidecar_read_the_settings_of_its_daemon(pod: dict[str, Any]) -> None:
    sidecar = container(pod, "smartspec")
    assert "args" not in sidecar
    (mount,) = (m for m in sidecar["volumeMounts"] if m["name"] == "smartspec-config")
    assert variables(sidecar)["SMARTSPEC_CONFIG"] == f"{mount['mountPath']}/smartspec.toml"


def test_sidecar_may_do_no_more_than_it_must(pod: dict[str, Any]) -> None:
    """The rules of Kubernetes' `restricted` standard, and a root that is read-only."""
    for name in ("smartspec", "smartspec-adapter"):
        context = container(pod, name)["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] > 0
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "memory" in container(pod, name)["resources"]["limits"]


def test_containerfile_names_files_that_exist_and_are_let_in(repository: Path) -> None:
    allowed = {
        line[1:]
        for line in (repository / ".containerignore").read_text("utf-8").splitlines()
        if line.startswith("!")
    }
    copied: set[str] = set()
    for line in (repository / "Containerfile").read_text("utf-8").splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= {word for word in line.split()[1:-1] if not word.startswith("--")}
    assert copied == allowed
    for name in copied:
        assert (repository / name).exists(), name


# -- the sidecar's script -----------------------------------------------------------------------

FAKE = """#!/bin/sh
echo "$@" >> "$LOG"
n=$(wc -l < "$LOG")
[ "$n" -le "$FAILURES" ] && exit 2
trap 'echo stopped >> "$LOG"; exit 0' TERM
while :; do sleep 0.05; done
"""
ASKED = "run --exit-when-stuck 60 --set mode=observe"


class Script:
    """The sidecar's script with a `smartspec` that fails at first, as often as ``failures``."""

    def __init__(self, folder: Path, place: Path, failures: int, **env: str) -> None:
        fake = place / "bin" / "smartspec"
        fake.parent.mkdir()
        fake.write_text(FAKE, "utf-8")
        fake.chmod(0o755)
        (place / "volume").mkdir(mode=0o777)
        self.runtime_dir = place / "volume" / "daemon"
        self.log = place / "log"
        self.process = subprocess.Popen(
            ["sh", str(folder / "sidecar.sh"), "--set", "mode=observe"],
            env={
                "PATH": f"{fake.parent}:{os.environ['PATH']}",
                "LOG": str(self.log),
                "FAILURES": str(failures),
                "SMARTSPEC_RUNTIME_DIR": str(self.runtime_dir),
                **env,
            },
            stderr=subprocess.PIPE,
            text=True,
        )

    def stop(self) -> str:
        """Stop it as the kubelet does; returns what it said."""
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=10)
        assert self.process.returncode == 0
        return said


@pytest.fixture
def sidecar(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Script]]:
    started: list[Script] = []

    def start(failures: int, **env: str) -> Script:
        started.append(Script(folder, tmp_path, failures, **env))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def lines_of(log: Path, count: int) -> list[str]:
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        lines = log.read_text("utf-8").splitlines() if log.exists() else []
        if len(lines) >= count:
            return lines
        time.sleep(0.02)
    raise AssertionError(f"no {count} lines in {log}")


def test_sidecar_starts_a_daemon_again_and_hands_it_the_stop(
    sidecar: Callable[..., Script],
) -> None:
    script = sidecar(1, SMARTSPEC_RESTART_S="0")
    assert lines_of(script.log, 2)[:2] == [ASKED] * 2
    mode = stat.S_IMODE(script.runtime_dir.stat().st_mode)
    assert mode == 0o750  # neither refused by the daemon, nor closed to the engine's group
    time.sleep(0.2)  # the fake has set its trap by then
    assert "code 2" in script.stop()
    assert script.log.read_text("utf-8").splitlines()[-1] == "stopped"


def test_sidecar_stays_up_with_a_daemon_that_cannot_start_and_tries_it_less_and_less(
    sidecar: Callable[..., Script],
) -> None:
    script = sidecar(1000, SMARTSPEC_RESTART_S="1")
    lines_of(script.log, 3)  # after 0, 1 and 3 seconds
    time.sleep(0.5)  # it has seen the third one end by then
    assert script.process.poll() is None
    said = script.stop()
    assert re.findall(r"again in (\d+) s", said) == ["1", "2", "4"]


def test_sidecar_stays_up_where_its_volume_cannot_be_written(
    sidecar: Callable[..., Script], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / "file" / "daemon")
    script = sidecar(0, SMARTSPEC_RESTART_S="1", SMARTSPEC_RUNTIME_DIR=path)
    time.sleep(0.5)
    assert script.process.poll() is None
    assert "code 1" in script.stop()
