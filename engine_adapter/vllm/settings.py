"""What a user may set of the adapter: in vLLM's ``additional_config``, or in the environment.

    --additional-config '{"smartspec": {"endpoint": "ipc:///run/smartspec/engines.sock"}}'

What ``additional_config`` says goes before the environment, that before the default.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from smartspec.engine_adapter.curve import EngineKeys, read_keys

SECTION = "smartspec"  #: of additional_config
ENVIRONMENT = {
    "endpoint": "SMARTSPEC_ENDPOINT",
    "keys": "SMARTSPEC_ENGINE_KEYS",
    "engine": "SMARTSPEC_ENGINE_NAME",
    "mode": "SMARTSPEC_ENGINE_MODE",
    "lengths": "SMARTSPEC_ENGINE_LENGTHS",
}
LOOPBACK = ("tcp://127.0.0.1:", "tcp://localhost:", "tcp://[::1]:")  #: may be unencrypted
SYSTEM_RUNTIME_DIR = "/run/smartspec"  #: of the daemon as a systemd service
SHARED = "/tmp"  #: has the directory of a user who has none of the session's


class SettingsError(ValueError):
    """A setting that cannot be used: names the key, and what was expected."""


class Settings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The adapter's settings."""

    endpoint: str = ""  #: where the daemon listens; empty: `default_endpoint`
    keys: str = ""  #: the engine's key file (`smartspec keys add`), which tcp:// needs
    engine: Annotated[str, Meta(max_length=200)] = ""  #: unique on the daemon; empty: the model's
    mode: Literal["control", "off"] = "control"  #: off: vLLM as without us
    #: ragged: a length per request; uniform: one for all of a step, for attention backends that
    #: need it; both: whichever pays, by what each has cost; auto: both with CUDA graphs, or ragged
    lengths: Literal["auto", "ragged", "uniform", "both"] = "auto"


def load(additional_config: Any, environment: Mapping[str, str]) -> Settings:
    """Settings of one vLLM instance.

    Parameters
    ----------
    additional_config : vLLM's, a dict or something else that has nothing of ours
    environment : e.g. ``os.environ``

    Raises `SettingsError`.
    """
    values: dict[str, Any] = {
        key: environment[name] for key, name in ENVIRONMENT.items() if environment.get(name)
    }
    given = additional_config.get(SECTION) if isinstance(additional_config, Mapping) else None
    if given is not None:
        if not isinstance(given, Mapping):
            raise SettingsError(f"additional_config.{SECTION}: expected an object of settings")
        values |= given
    try:
        settings = msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        known = ", ".join(Settings.__struct_fields__)
        raise SettingsError(f"{SECTION} settings: {error}; the keys are {known}") from error
    endpoint = settings.endpoint or default_endpoint(environment)
    if "://" not in endpoint:
        raise SettingsError(
            f"{SECTION}.endpoint: {endpoint!r}, expected an address such as ipc:///run/x.sock"
        )
    if endpoint.startswith("tcp://") and not (settings.keys or endpoint.startswith(LOOPBACK)):
        raise SettingsError(
            f"{SECTION}.keys: {endpoint} is encrypted, and takes the engine's key file: make one "
            "with `smartspec keys add` (docs/security.md)"
        )
    return msgspec.structs.replace(settings, endpoint=endpoint)


def keys_of(settings: Settings) -> EngineKeys | None:
    """The engine's keys, where it has any. Raises `SettingsError`."""
    if not settings.keys:
        return None
    try:
        return read_keys(Path(settings.keys))
    except ValueError as error:
        raise SettingsError(f"{SECTION}.keys: {error}") from error


def default_endpoint(environment: Mapping[str, str]) -> str:
    """Where a default daemon listens: the system's if there is one, else the user's.

    The system's directory is there from boot on, whether its daemon runs or not. One below /tmp,
    which any local user can make, is taken only where it is this user's own.
    """
    folder = environment.get("SMARTSPEC_RUNTIME_DIR", "")
    if not folder and not Path(SYSTEM_RUNTIME_DIR).is_dir():
        own = environment.get("XDG_RUNTIME_DIR", "")
        shared = Path(SHARED, f"smartspec-{os.getuid()}")
        folder = f"{own}/smartspec" if own else str(shared) if _is_ours(shared) else ""
    return f"ipc://{folder or SYSTEM_RUNTIME_DIR}/engines.sock"


def _is_ours(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
