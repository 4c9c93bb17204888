"""Commands for settings and for keys: `smartspec config ...` and `smartspec keys ...`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from smartspec.daemon import config_text
from smartspec.daemon.cli_options import (
    Assignments,
    ConfigFile,
    fail,
    load_settings,
    settings_beside,
)

config_app = typer.Typer(
    help="Show, check and explain settings.", no_args_is_help=True, rich_markup_mode=None
)
keys_app = typer.Typer(
    help="Make, show and rotate the keys of tcp:// (docs/security.md).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
DEFAULT_KEYS = Path("/etc/smartspec/keys")


@config_app.command("defaults")
def config_defaults() -> None:
    """Print a file with every setting, explained, at its default."""
    typer.echo(config_text.default_toml(), nl=False)


@config_app.command("reference")
def config_reference() -> None:
    """Print every setting as a table, in Markdown (docs/configuration.md)."""
    typer.echo(config_text.reference(), nl=False)


@config_app.command("check")
def config_check(config_file: ConfigFile = None, set_: Assignments = None) -> None:
    """Say whether the settings are good."""
    load_settings(config_file, set_)
    typer.echo(f"{config_file or 'settings'}: good")


@config_app.command("show")
def config_show(config_file: ConfigFile = None, set_: Assignments = None) -> None:
    """Print the settings in force: file, environment and flags together.

    Without any of them they are those of the daemon that commands look for.
    """
    typer.echo(config_text.to_toml(settings_beside(config_file, set_)), nl=False)


KeyDirectory = Annotated[
    Path, typer.Option("--directory", "-d", help="Of the keys (setting curve.directory).")
]
EngineName = Annotated[str, typer.Argument(metavar="NAME", help="Of the engine's keys.")]


@contextlib.contextmanager
def _key_errors() -> Iterator[None]:
    from smartspec.daemon.admission.curve_keys import KeyFileError

    try:
        yield
    except KeyFileError as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")


@keys_app.command("make")
def keys_make(directory: KeyDirectory = DEFAULT_KEYS) -> None:
    """Make the daemon's keys and an empty list of engines."""
    from smartspec.daemon.admission import curve_keys

    with _key_errors():
        curve_keys.make(directory)
    typer.echo(f"{directory}: made; next: smartspec keys add NAME")


@keys_app.command("add")
def keys_add(name: EngineName, directory: KeyDirectory = DEFAULT_KEYS) -> None:
    """Let an engine in: its file is to be carried to its host, by a safe way."""
    from smartspec.daemon.admission import curve_keys

    with _key_errors():
        path = curve_keys.add(directory, name)
    typer.echo(f"{path}: carry it to the engine's host; then reload the daemon (SIGHUP)")


@keys_app.command("show")
def keys_show(directory: KeyDirectory = DEFAULT_KEYS) -> None:
    """List names and public keys; secrets are never shown."""
    from smartspec.daemon.admission import curve_keys

    with _key_errors():
        for name, key in curve_keys.public_keys(directory).items():
            typer.echo(f"{name:24} {key}")


@keys_app.command("rotate")
def keys_rotate(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Of an engine; without: the daemon's.")
    ] = None,
    directory: KeyDirectory = DEFAULT_KEYS,
) -> None:
    """Make new keys. An engine's old one opens until `keys drop NAME~`; the daemon's does not."""
    from smartspec.daemon.admission import curve_keys

    with _key_errors():
        for path in curve_keys.rotate(directory, name):
            typer.echo(f"{path}: carry it to the engine's host")
    typer.echo("then reload the daemon (SIGHUP)" if name else "then restart the daemon")


@keys_app.command("drop")
def keys_drop(name: EngineName, directory: KeyDirectory = DEFAULT_KEYS) -> None:
    """Let an engine in no more. A connection that is open stays so until it ends."""
    from smartspec.daemon.admission import curve_keys

    with _key_errors():
        curve_keys.drop(directory, name)
    typer.echo(f"{name}: dropped; reload the daemon (SIGHUP), restart it to end open connections")
