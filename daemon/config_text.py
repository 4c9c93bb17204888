"""Settings as text: the default file, the settings in force, the reference, and what changed."""

from __future__ import annotations

from typing import Any

import msgspec

from smartspec.daemon.config import Settings, flatten, keys, redacted


def default_toml() -> str:
    """The default configuration file: every key, its meaning, its variable and its default."""
    lines = [
        "# SmartSpec settings. Every key may be left out; shown are the defaults.",
        "# The environment variable SMARTSPEC_<SECTION>_<KEY> overrides a key; a flag, both.",
    ]
    section = ""
    for key in keys().values():
        head, _, name = key.name.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"[{section}]"]
        lines += ["", *_comment(key.doc), f"{name} = {_toml(key.default)}"]
    return "\n".join(lines) + "\n"


def to_toml(settings: Settings) -> str:
    """The settings in force, as a file that `load` reads back to the same."""
    values = flatten(msgspec.to_builtins(settings))
    lines: list[str] = []
    section = ""
    for key in keys().values():
        head, _, name = key.name.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"[{section}]"]
        value = redacted(values[key.name]) if key.name == "redis.url" else values[key.name]
        lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _comment(text: str, width: int = 92) -> list[str]:
    lines, line = [], "#"
    for word in text.split():
        if len(line) + 1 + len(word) > width:
            lines.append(line)
            line = "#"
        line += " " + word
    return [*lines, line]


def _toml(value: Any) -> str:
    # JSON strings, numbers and booleans are TOML as well.
    return msgspec.json.encode(value).decode()


def differences(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose value differs, as (old, new)."""
    before = flatten(msgspec.to_builtins(old))
    after = flatten(msgspec.to_builtins(new))
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}
