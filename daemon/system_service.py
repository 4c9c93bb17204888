"""The daemon that systemd runs on this host, for commands that are not told where to look.

What they look for is a user's own daemon where one runs, else the system's where it is installed:
its directories and its file of settings (systemd/smartspec.service).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from smartspec.daemon import commands, config
from smartspec.daemon.config import Settings

RUNTIME_DIR = Path("/run/smartspec")
STATE_DIRECTORY = Path("/var/lib/smartspec")
FILE = Path("/etc/smartspec/smartspec.toml")


def listens(path: Path) -> bool:
    """Whether somebody listens at a Unix socket, and we may connect."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(2.0)
        try:
            connection.connect(str(path))
        except OSError:
            return False
        return True


def is_meant(settings: Settings, env: Mapping[str, str]) -> bool:
    """Whether the system's daemon is what a command with these settings is to look for."""
    nobody_said = Path(settings.runtime_dir) == Path(config.default_runtime_dir(env)).absolute()
    if env.get("RUNTIME_DIRECTORY") or not nobody_said or not RUNTIME_DIR.is_dir():
        return False
    return not listens(Path(commands.endpoint(settings).removeprefix("ipc://")))


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """What systemd tells the daemon of its directories, beside ``env``."""
    return {
        **env,
        "RUNTIME_DIRECTORY": str(RUNTIME_DIR),
        "STATE_DIRECTORY": str(STATE_DIRECTORY),
    }


def file() -> Path | None:
    """Its settings, where this user may read them."""
    return FILE if os.access(FILE, os.R_OK) else None
