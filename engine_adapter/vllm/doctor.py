"""Whether the vLLM of this Python can be steered.

``python -m smartspec.engine_adapter.vllm.doctor`` prints one JSON object a line: check, state
("ok", "warning", "failed"), text, advice. For people: ``smartspec doctor vllm --python PATH``,
which runs it with vLLM's Python. Starts no engine.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from smartspec.engine_adapter.vllm import compatibility, settings

SCHEDULER = "smartspec.engine_adapter.vllm.SmartSpecScheduler"


class Finding(NamedTuple):
    """As `smartspec.daemon.views.doctor` has it."""

    check: str
    state: str
    text: str
    advice: str = ""


def examine(environment: Mapping[str, str]) -> Iterator[Finding]:
    """All findings, in the order in which they matter."""
    yield Finding("python", "ok", f"{sys.executable}, {platform.python_version()}")
    version = compatibility.version()
    if not version:
        names = " or ".join(compatibility.DISTRIBUTIONS)
        advice = "run this with the Python that runs vLLM: --python PATH"
        yield Finding("vllm", "failed", f"{names} is not installed here", advice)
        return
    yield from check_version(version)
    yield from check_daemon(environment)


def check_version(version: str) -> Iterator[Finding]:
    try:
        problems = compatibility.problems()
    except Exception as error:  # anything may go wrong in somebody else's import
        advice = "repair the installation: `python -c 'import vllm'` must work"
        yield Finding("vllm", "failed", f"{version} cannot be imported: {error}", advice)
        return
    tested = ", ".join(compatibility.TESTED)
    if problems:
        text = f"{version} cannot be steered: {'; '.join(problems)}"
        advice = f"use a release that was tested ({tested}); with this one vLLM runs as configured"
        yield Finding("vllm", "failed", text, advice)
        return
    if version.split("+")[0] in compatibility.TESTED:
        yield Finding("vllm", "ok", f"{version}, a release that was tested")
    else:
        text = f"{version} has what is needed, but was not tested ({tested} was)"
        yield Finding("vllm", "warning", text, "try it on one engine first")
    both = "it serves engines with async scheduling too"
    yield Finding("scheduler", "ok", f"--scheduler-cls {SCHEDULER} ({both})")


def check_daemon(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether somebody listens where an engine of this user and environment would look."""
    try:
        found = settings.load(None, environment)
        settings.keys_of(found)
    except settings.SettingsError as error:
        yield Finding("settings", "failed", str(error), "correct it")
        return
    if found.mode == "off":
        name = settings.ENVIRONMENT["mode"]
        yield Finding("settings", "warning", f"{name} is off: nothing is steered", f"unset {name}")
    where = found.endpoint
    advice = "start it (`smartspec run`), or name its endpoint in additional_config"
    try:
        _connect(where)
    except (OSError, ValueError) as error:
        yield Finding("daemon", "failed", f"nobody is reached at {where}: {error}", advice)
    else:
        yield Finding("daemon", "ok", f"somebody listens at {where}")


def _connect(endpoint: str) -> None:
    scheme, _, address = endpoint.partition("://")
    if scheme == "ipc":
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(2.0)
            connection.connect(address)
        return
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()


def main() -> None:
    """Print all findings."""
    for finding in examine(os.environ):
        print(json.dumps(finding._asdict()), flush=True)


if __name__ == "__main__":
    main()
