"""What installing the adapter does to the environment that vLLM runs in."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from serving import vllm_python

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

#: Prints, of what the adapter requires: name, and whether vLLM brings a version that will do.
BROUGHT = """
import importlib.metadata as metadata
import json
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from smartspec.engine_adapter.vllm import compatibility

def required(name):
    found = map(Requirement, metadata.requires(name) or ())
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]

def installed(name):
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None

vllm = next(name for name in compatibility.DISTRIBUTIONS if installed(name))
brought, to_see = set(), [vllm]
while to_see:
    name = canonicalize_name(to_see.pop())
    if name not in brought and installed(name):
        brought.add(name)
        to_see += [requirement.name for requirement in required(name)]
print(json.dumps({
    r.name: canonicalize_name(r.name) in brought and r.specifier.contains(metadata.version(r.name))
    for r in required("smartspec")
}))
"""


def test_all_that_the_adapter_requires_comes_with_vllm() -> None:
    done = subprocess.run(
        [vllm_python(), "-c", BROUGHT], capture_output=True, text=True, check=True
    )
    brought = json.loads(done.stdout.splitlines()[-1])
    assert set(brought) == {"msgspec", "numpy", "pyzmq"}
    assert all(brought.values()), brought


def test_pip_would_install_nothing_else(repository: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [vllm_python(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--dry-run", "--no-index", "--no-build-isolation", "--report", str(report)]
    subprocess.run([*command, str(repository)], check=True)
    (only,) = json.loads(report.read_text("utf-8"))["install"]
    assert only["metadata"]["name"] == "smartspec"
