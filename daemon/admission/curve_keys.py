"""CURVE keys on disk: the daemon's own, and the list of the engines that may connect.

One directory holds ``daemon.key`` (secret), ``daemon.pub``, ``engines.allow`` (a line per engine:
name and public key) and, until they are carried to their hosts, the ``NAME.engine`` files, each of
which has all that one engine needs. Files with secrets have mode 0600, and are refused when others
may read them. Keys are in ZeroMQ's Z85 text of 40 characters.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq

SECRET, PUBLIC, ALLOWED = "daemon.key", "daemon.pub", "engines.allow"
OLD = "~"  #: ends the name of a key that was replaced and still opens
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}~?")


class KeyFileError(ValueError):
    """Keys that cannot be used. The message names the file and says what to do."""


@dataclass(frozen=True)
class DaemonKeys:
    """What the daemon needs; the secret is never shown."""

    public: bytes
    secret: bytes = field(repr=False)
    allowed: dict[bytes, str]  #: names of engines by public key


def make(directory: Path) -> None:
    """A new pair for the daemon, and an empty list. Raises `KeyFileError` when there is one."""
    if (directory / SECRET).exists():
        raise KeyFileError(
            f"{directory / SECRET}: there already; `smartspec keys rotate` renews it"
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_pair(directory)
    if not (directory / ALLOWED).exists():
        _write(directory / ALLOWED, "", 0o644)


def add(directory: Path, name: str) -> Path:
    """Let a new engine in; returns the file to carry to its host."""
    engines = _allowed(directory)
    if name in engines:
        raise KeyFileError(f"{name}: on the list already; `smartspec keys rotate {name}` renews it")
    return _issue(directory, name, engines)


def rotate(directory: Path, name: str | None = None) -> list[Path]:
    """New keys for an engine, or for the daemon; returns the files to carry anew.

    An engine's old key opens until it is dropped (as ``NAME~``), so that it can be replaced while
    it runs. The daemon's cannot: all engines' files that are here are written anew, and engines
    with the old one run on as configured.
    """
    engines = _allowed(directory)
    if name is not None:
        if name not in engines:
            raise KeyFileError(f"{name}: not on the list; `smartspec keys add {name}` adds it")
        engines[name + OLD] = engines.pop(name)
        return [_issue(directory, name, engines)]
    _write_pair(directory)
    carried = sorted(directory.glob("*.engine"))
    for path in carried:
        lines = path.read_text("ascii").splitlines()
        kept = [line for line in lines if not line.startswith("server ")]
        _write(path, "\n".join([f"server {_public(directory)}", *kept]) + "\n", 0o600)
    return carried


def drop(directory: Path, name: str) -> None:
    """Let an engine in no more; a connection that is open stays so until it ends."""
    engines = _allowed(directory)
    if engines.pop(name, None) is None:
        known = ", ".join(engines) or "none"
        raise KeyFileError(f"{name}: not on the list; known: {known}")
    _write_allowed(directory, engines)
    if not name.endswith(OLD):
        (directory / f"{name}.engine").unlink(missing_ok=True)


def read(directory: Path) -> DaemonKeys:
    """All that the daemon needs. Raises `KeyFileError`."""
    secret = _key(read_secret(directory / SECRET).strip(), directory / SECRET)
    allowed = {key.encode(): name for name, key in _allowed(directory).items()}
    return DaemonKeys(zmq.curve_public(secret), secret, allowed)


def public_keys(directory: Path) -> dict[str, str]:
    """Names and public keys, the daemon's first: nothing of it is secret."""
    return {"daemon": _public(directory), **_allowed(directory)}


def read_secret(path: Path) -> str:
    """Text of a file that only its owner may read. Raises `KeyFileError`."""
    try:
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise KeyFileError(f"{path}: others may read it (mode {mode & 0o777:o}): chmod 600 it")
        return path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise KeyFileError(
            f"{path}: cannot be read ({why}); `smartspec keys make` makes keys"
        ) from error


def _issue(directory: Path, name: str, engines: dict[str, str]) -> Path:
    if not _NAME.fullmatch(name) or name.endswith(OLD):
        raise KeyFileError(f"{name}: expected letters, digits, '.', '_' and '-', 64 at most")
    public, secret = (key.decode() for key in zmq.curve_keypair())
    path = directory / f"{name}.engine"
    text = f"server {_public(directory)}\npublic {public}\nsecret {secret}\n"
    _write(path, text, 0o600)
    _write_allowed(directory, {**engines, name: public})
    return path


def _write_pair(directory: Path) -> None:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    _write(directory / SECRET, secret + "\n", 0o600)
    _write(directory / PUBLIC, public + "\n", 0o644)


def _write_allowed(directory: Path, engines: dict[str, str]) -> None:
    lines = [f"{name} {key}\n" for name, key in sorted(engines.items())]
    _write(directory / ALLOWED, "".join(lines), 0o644)


def _write(path: Path, text: str, mode: int) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
    partial.replace(path)


def _public(directory: Path) -> str:
    path = directory / PUBLIC
    try:
        return _key(path.read_text("ascii").strip(), path).decode()
    except OSError as error:
        raise KeyFileError(
            f"{path}: cannot be read ({error.strerror}); `smartspec keys make` makes keys"
        ) from error


def _allowed(directory: Path) -> dict[str, str]:
    path = directory / ALLOWED
    try:
        lines = path.read_text("ascii").splitlines()
    except OSError as error:
        raise KeyFileError(
            f"{path}: cannot be read ({error.strerror}); `smartspec keys make` makes keys"
        ) from error
    engines: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, key = line.partition(" ")
        if not _NAME.fullmatch(name):
            raise KeyFileError(f"{path}, line {number}: expected a name and a key")
        engines[name] = _key(key.strip(), path).decode()
    return engines


def _key(text: str, path: Path) -> bytes:
    if len(text) != 40:  # the text itself may be a secret
        raise KeyFileError(f"{path}: a key of {len(text)} characters, expected 40")
    return text.encode("ascii")
