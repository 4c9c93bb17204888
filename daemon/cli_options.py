"""What all groups of commands share: common options, settings, and how a mistake is told."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from smartspec.daemon import config
from smartspec.daemon.config import ConfigError, Settings

EXIT_FAILED = 1  #: as things are: trying again may help
EXIT_USAGE = 2

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="SMARTSPEC_CONFIG", help="TOML file with settings."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting, e.g. control.ttl_s=2. Repeatable."),
]
RuntimeDir = Annotated[
    str | None, typer.Option(help="Directory of the sockets (setting runtime_dir).")
]


def fail(text: object, code: int = EXIT_USAGE) -> NoReturn:
    """One line that names the mistake, and out."""
    typer.echo(f"smartspec: {text}", err=True)
    raise typer.Exit(code)


def assigned(assignments: list[str] | None) -> dict[str, Any]:
    """``--set KEY=VALUE ...`` as a mapping; raises `ConfigError` for one without a value."""
    values = {}
    for assignment in assignments or []:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE")
        values[name.strip()] = value.strip()
    return values


def load_settings(
    path: Path | None,
    assignments: list[str] | None,
    env: Mapping[str, str] | None = None,
    **flags: Any,
) -> Settings:
    """Settings, or one line on what is wrong with them. ``flags``: ``control__ttl_s=...``."""
    try:
        named = {name.replace("__", "."): value for name, value in flags.items()}
        given = {name: value for name, value in named.items() if value is not None}
        return config.load(path, env, overrides={**assigned(assignments), **given})
    except ConfigError as error:
        fail(error)


def settings_beside(path: Path | None, assignments: list[str] | None, **flags: Any) -> Settings:
    """The same for a command beside a running daemon: the system's, where nothing says which."""
    from smartspec.daemon import system_service

    settings = load_settings(path, assignments, **flags)
    if not system_service.is_meant(settings, os.environ):
        return settings
    env = system_service.environment(os.environ)
    return load_settings(path or system_service.file(), assignments, env, **flags)


def optional(module: str, extra: str) -> Any:
    """Import a part whose packages the daemon does without."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("smartspec"):
            raise
        fail(f"the package {error.name} is not installed: pip install 'smartspec[{extra}]'")
