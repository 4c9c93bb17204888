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
from collections.abc import Iterator
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


def test_probe_and_scrapes_reach_the_exporter(
    pod: dict[str, Any], rendered: list[dict[str, Any]], tmp_path: Path
) -> None:
    (given,) = (one["data"] for one in rendered if one["kind"] == "ConfigMap")
    (tmp_path / "smartspec.toml").write_text(given["smartspec.toml"], "utf-8")
    settings = config.load(tmp_path / "smartspec.toml", env={})
    sidecar = container(pod, "smartspec")
    (port,) = sidecar["ports"]
    assert port["containerPort"] == settings.telemetry.prometheus_port
    assert sidecar["livenessProbe"]["httpGet"] == {"path": "/health", "port": port["name"]}
    assert settings.telemetry.prometheus_address == "0.0.0.0"


def test_engine_is_ready_without_its_sidecar(pod: dict[str, Any]) -> None:
    sidecar = container(pod, "smartspec")
    assert "readinessProbe" not in sidecar and "startupProbe" not in sidecar


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
[ "$n" = 1 ] && exit 7
trap 'echo stopped >> "$LOG"; exit 0' TERM
while :; do sleep 0.05; done
"""


@pytest.fixture
def script(folder: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The script with a `smartspec` that fails once, and the file of what that was told."""
    fake = tmp_path / "bin" / "smartspec"
    fake.parent.mkdir()
    fake.write_text(FAKE, "utf-8")
    fake.chmod(0o755)
    (tmp_path / "volume").mkdir(mode=0o777)
    log = tmp_path / "log"
    process = subprocess.Popen(
        ["sh", str(folder / "sidecar.sh"), "--config", "x.toml"],
        env={
            "PATH": f"{fake.parent}:{os.environ['PATH']}",
            "LOG": str(log),
            "SMARTSPEC_RUNTIME_DIR": str(tmp_path / "volume" / "daemon"),
            "SMARTSPEC_RESTART_S": "0.1",
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process, log
    process.kill()
    process.communicate()


def lines_of(log: Path, count: int) -> list[str]:
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        lines = log.read_text("utf-8").splitlines() if log.exists() else []
        if len(lines) >= count:
            return lines
        time.sleep(0.02)
    raise AssertionError(f"no {count} lines in {log}")


def test_sidecar_starts_a_daemon_again_and_hands_it_the_stop(
    script: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, log = script
    assert lines_of(log, 2)[:2] == ["run --config x.toml"] * 2
    mode = stat.S_IMODE((tmp_path / "volume" / "daemon").stat().st_mode)
    assert mode == 0o750  # neither refused by the daemon, nor closed to the engine's group
    time.sleep(0.2)  # the fake has set its trap by then
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 0
    assert log.read_text("utf-8").splitlines()[-1] == "stopped"
    assert re.search(r"code 7", said)
