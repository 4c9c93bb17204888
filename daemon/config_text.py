"""Settings as text: the default file, the settings in force, the reference, and what changed."""

from __future__ import annotations

import typing
from typing import Any

import msgspec

from smartspec.daemon import config
from smartspec.daemon.config import Settings, flatten, keys
from smartspec.daemon.redis_url import redacted


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
        lines.append(f"{name} = {_shown(key.name, values[key.name])}")
    return "\n".join(lines) + "\n"


def reference() -> str:
    """docs/configuration.md: every key with its type, default and when a change takes effect."""
    lines = [REFERENCE_HEAD]
    for section, about in config.sections().items():
        lines += ["", f"## `[{section}]`" if section else "## Above all sections", "", about, ""]
        lines += ["| key | type | default | applies | meaning |", "|---|---|---|---|---|"]
        for key in keys().values():
            head, _, name = key.name.rpartition(".")
            if head == section:
                default = f"`{_toml(key.default)}`"
                row = (f"`{name}`", kind_in_words(key.type), default, key.applies, key.doc)
                lines.append("| " + " | ".join(cell.replace("<", "\\<") for cell in row) + " |")
    return "\n".join(lines) + "\n"


REFERENCE_HEAD = """\
# Settings

Made from the code by `smartspec config reference`; a test compares the two.

One TOML file (`--config`, or `SMARTSPEC_CONFIG`), every key of which may be left out. The variable
`SMARTSPEC_<KEY>` or `SMARTSPEC_<SECTION>_<KEY>` overrides the file, and a flag (`--set KEY=VALUE`)
both. `smartspec config defaults` prints a file to start from, `smartspec config check` says what is
wrong with one, `smartspec config show` prints what is in force, passwords left out. Unknown keys,
values out of bounds and settings that contradict each other are refused by name.

SIGHUP (`systemctl reload smartspec`) loads the settings anew, and the log says what has changed. A
file that cannot be used changes nothing. *applies* says when a change takes effect: **now**, at
SIGHUP; **telemetry**, likewise, by a new telemetry process (an embedded Valkey begins empty then);
**restart**, when the daemon starts next.\
"""


def kind_in_words(kind: Any) -> str:
    """A setting's type and bounds, for people.

    >>> from typing import Annotated, Literal
    >>> kind_in_words(Annotated[float, msgspec.Meta(gt=0, le=0.5)])
    'number > 0, <= 0.5'
    >>> kind_in_words(Annotated[Literal["a", "b"], msgspec.Meta(description="...")])
    '"a" or "b"'
    """
    base, metas = getattr(kind, "__origin__", kind), getattr(kind, "__metadata__", ())
    if choices := typing.get_args(base):
        return " or ".join(_toml(choice) for choice in choices)
    bounds = [
        f"{sign} {bound:g}"
        for meta in metas
        for sign, bound in ((">", meta.gt), (">=", meta.ge), ("<", meta.lt), ("<=", meta.le))
        if bound is not None
    ]
    word = {str: "text", int: "integer", float: "number", bool: "boolean"}[base]
    return " ".join((word, ", ".join(bounds))).strip()


def change(name: str, old: Any, new: Any) -> str:
    """One changed setting in words, without its secrets.

    >>> change("control.ttl_s", 1.0, 2.5)
    'control.ttl_s: 1.0 -> 2.5'
    """
    return f"{name}: {_shown(name, old)} -> {_shown(name, new)}"


def _shown(name: str, value: Any) -> str:
    return _toml(redacted(value) if name == "redis.url" else value)


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
