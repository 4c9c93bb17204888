"""An engine's CURVE keys, from the file that `smartspec keys add` makes for it."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class EngineKeys:
    """In ZeroMQ's Z85 text, 40 characters each; the secret is never shown."""

    server: bytes  #: the daemon's public key: whoever lacks its secret cannot pose as the daemon
    public: bytes
    secret: bytes = field(repr=False)


def read_keys(path: Path) -> EngineKeys:
    """Keys of one engine. Raises ValueError, which names the file and says what to do."""
    try:
        mode = path.stat().st_mode
        lines = path.read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"{path}: others may read it (mode {mode & 0o777:o}): chmod 600 it")
    values = {name: key.strip() for name, _, key in (line.partition(" ") for line in lines)}
    names = ("server", "public", "secret")
    if any(len(values.get(name, "")) != 40 for name in names):
        raise ValueError(f"{path}: expected a line with a key of 40 characters for each of {names}")
    return EngineKeys(*(values[name].encode() for name in names))
