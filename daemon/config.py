"""Settings: one TOML file, environment variables over it, flags over these.

Every key is declared once, below, with its type, bounds, default and what it means; the names of
the environment variables, the error messages, the default file and the reference (config_text.py)
follow from that. Loaded once, then frozen.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from smartspec.daemon.admission.endpoints import MAX_SOCKET_PATH, check_address, check_endpoint
from smartspec.daemon.admission.endpoints import ConfigError as ConfigError
from smartspec.daemon.redis_url import check_redis_url, redacted

ENV_PREFIX = "SMARTSPEC_"

Seconds = Annotated[float, Meta(gt=0, le=1e9)]  # bounded: TOML knows inf
Share = Annotated[float, Meta(ge=0, le=0.5)]
Count = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]


#: When a changed value takes effect at SIGHUP: at once, with a new telemetry process, or not.
Applies = Literal["now", "telemetry", "restart"]


def _doc(text: str, applies: Applies = "restart") -> Meta:
    return Meta(description=text, extra={"applies": applies})


class ControlSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How policies are kept alive and how much is spent on learning."""

    heartbeat_s: Annotated[
        Seconds, _doc("Seconds between heartbeats to the engines; at most half of ttl_s.", "now")
    ] = 0.2
    ttl_s: Annotated[
        Seconds,
        _doc("Seconds after the last word from the daemon at which a policy expires.", "now"),
    ] = 1.0
    fallback_s: Annotated[
        Seconds,
        _doc(
            "Seconds after expiry during which an engine uses the learned batch-to-length table; "
            "then its own configuration.",
            "now",
        ),
    ] = 60.0
    probe_share: Annotated[
        Share,
        _doc(
            "Share of goodput (0 to 0.5) that may be spent on trying lengths that would not be "
            "chosen. 0: never probe.",
            "now",
        ),
    ] = 0.005
    seed_sweep: Annotated[
        bool,
        _doc("Try lengths for all when an engine is new, so that its costs are known.", "now"),
    ] = True
    meet_targets: Annotated[
        bool,
        _doc(
            "Keep the seconds per token that requests ask for (token_time_target_s), where they "
            "are within reach, at the expense of goodput. false: goodput alone.",
            "now",
        ),
    ] = True
    max_engines: Annotated[Count, _doc("Engines served at once; more are refused.", "now")] = 1024
    engine_timeout_s: Annotated[
        Seconds,
        _doc(
            "Seconds of silence after which an engine that is no longer connected is lost.", "now"
        ),
    ] = 60.0


class CurveSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Encryption of tcp:// (docs/security.md)."""

    directory: Annotated[
        str,
        _doc(
            "Directory of keys, made by `smartspec keys make`: an endpoint of tcp:// is then "
            "encrypted, and only engines on its list may connect. Empty: none."
        ),
    ] = ""


class LimitSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one engine may ask of the daemon, so that none can take it from the others."""

    max_reports_per_s: Annotated[
        Count,
        Meta(le=100_000),
        _doc(
            "Reports per second and connection that are read; more are counted and dropped.", "now"
        ),
    ] = 1000
    max_requests: Annotated[
        Count,
        Meta(le=4096),
        _doc("Requests in one report; an engine that announces more is refused.", "now"),
    ] = 4096
    max_frame_bytes: Annotated[
        int,
        Meta(ge=4096, le=1 << 20),
        _doc("Bytes of one message; a connection that sends a larger one is closed."),
    ] = 1 << 18
    quarantine_after: Annotated[
        Count,
        _doc(
            "Reports that cannot be true, less a twentieth of the good ones, after which an engine "
            "is put in quarantine.",
            "now",
        ),
    ] = 10
    quarantine_s: Annotated[
        Seconds,
        _doc("Seconds of the first quarantine; each further one lasts twice as long.", "now"),
    ] = 10.0


class AdoptionSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How SmartSpec is compared with what the engine does without it (docs/adoption.md)."""

    canary_share: Annotated[
        float,
        Meta(gt=0, le=0.5),
        _doc("Share of time (up to 0.5) that canary mode steers.", "now"),
    ] = 0.25
    check_loss: Annotated[
        float,
        Meta(ge=0, le=0.05),
        _doc(
            "Share of goodput (0 to 0.05) that control mode may give up to measure the gain, by "
            "running the engine's own setting and no speculation: as seldom as they are known to "
            "lose much, and at most 10 times this share of the time. More is given for a while "
            "when SmartSpec seems to be worse. 0: never; then nothing is measured and nothing "
            "given up.",
            "now",
        ),
    ] = 0.001
    block_s: Annotated[
        Seconds, _doc("Seconds of steps in one block of a comparison; at least 16 steps.", "now")
    ] = 2.0
    tolerance: Annotated[
        Share,
        _doc(
            "Share of goodput that SmartSpec may be worse than the engine's own setting. When it "
            "is measurably worse by more, the engine is left to itself for a while.",
            "now",
        ),
    ] = 0.02
    retry_s: Annotated[
        Seconds,
        _doc("Seconds until it is tried again; each time twice as long, up to a day.", "now"),
    ] = 300.0


class RedisSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the telemetry process keeps state and history (docs/redis.md)."""

    url: Annotated[
        str,
        _doc(
            "redis://, rediss:// or unix:// address of a Redis or Valkey server. Empty: an "
            "embedded Valkey on the Unix socket <runtime_dir>/valkey.sock.",
            "telemetry",
        ),
    ] = ""
    username: Annotated[
        str, _doc("ACL user, beside password_file. Empty: the server's default user.", "telemetry")
    ] = ""
    password_file: Annotated[
        str,
        _doc(
            "File that holds the password and nothing else, read anew at every connection. Empty: "
            "the password in url, if any.",
            "telemetry",
        ),
    ] = ""
    ca_file: Annotated[
        str,
        _doc(
            "Certificates, in PEM, of those who may vouch for a rediss:// server. Empty: those of "
            "the system.",
            "telemetry",
        ),
    ] = ""
    key_prefix: Annotated[
        str, _doc("Put before every key; the data version follows it.", "telemetry")
    ] = "smartspec:"
    stream_maxlen: Annotated[
        Count, _doc("Entries kept per stream, approximately.", "telemetry")
    ] = 10_000
    ttl_s: Annotated[
        Count,
        _doc("Seconds after the last write at which the keys of an engine disappear.", "telemetry"),
    ] = 86_400


class StateSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was learned, kept over restarts (docs/state.md)."""

    enabled: Annotated[
        bool, _doc("Keep what was learned in files and in Redis, and start from it.")
    ] = True
    directory: Annotated[
        str,
        _doc(
            "Directory of the files. Empty: $STATE_DIRECTORY (systemd), else "
            "$XDG_STATE_HOME/smartspec, else ~/.local/state/smartspec."
        ),
    ] = ""
    checkpoint_s: Annotated[
        Seconds,
        _doc(
            "Seconds between two checkpoints: what a crash may cost. The telemetry process writes "
            "them; without it they are written at shutdown only.",
            "now",
        ),
    ] = 60.0
    max_kept: Annotated[
        Count,
        Meta(le=1024),
        _doc("Checkpoints kept, one per kind of engine; the oldest are deleted."),
    ] = 64


class TelemetrySettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The process beside the daemon that writes Redis and serves Prometheus."""

    enabled: Annotated[bool, _doc("Start the telemetry process with the daemon.", "telemetry")] = (
        True
    )
    prometheus_port: Annotated[
        Port, _doc("TCP port for Prometheus to scrape. 0: no exporter.", "telemetry")
    ] = 9469
    prometheus_address: Annotated[
        str,
        _doc(
            "IP address that the port is on. Whoever reaches it may read names of engines and "
            "all metrics, and nothing else.",
            "telemetry",
        ),
    ] = "127.0.0.1"


class LogSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What goes to standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        _doc("Least severe level that is logged.", "now"),
    ] = "info"
    format: Annotated[
        Literal["auto", "text", "json"],
        _doc(
            "json: one object per line. auto: fields for systemd's journal where standard error "
            "goes there, else text.",
            "now",
        ),
    ] = "auto"


class Settings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All settings; `load` fills in the paths that depend on the runtime directory."""

    mode: Annotated[
        Literal["observe", "canary", "control"],
        _doc(
            "observe: learn and predict the gain, steer nothing. canary: steer a share of the time "
            "and compare. control: steer."
        ),
    ] = "control"
    runtime_dir: Annotated[
        str,
        _doc(
            "Directory of sockets and the lock file, created with mode 0700. Empty: "
            "$RUNTIME_DIRECTORY (systemd), else $XDG_RUNTIME_DIR/smartspec, else "
            "/tmp/smartspec-<uid>."
        ),
    ] = ""
    endpoint: Annotated[
        str,
        _doc(
            "Where engines connect: ipc://PATH; tcp://ADDRESS:PORT with curve.directory; or "
            "tcp://127.0.0.1:PORT with insecure = true. "
            "Empty: ipc://<runtime_dir>/engines.sock."
        ),
    ] = ""
    insecure: Annotated[
        bool, _doc("Allow an unencrypted, unauthenticated tcp:// address on the loopback.")
    ] = False
    bus_endpoint: Annotated[
        str,
        _doc(
            "Where the daemon publishes events to other processes. Empty: "
            "ipc://<runtime_dir>/bus.sock."
        ),
    ] = ""
    control: ControlSettings = field(default_factory=ControlSettings)
    curve: CurveSettings = field(default_factory=CurveSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    adoption: AdoptionSettings = field(default_factory=AdoptionSettings)
    redis: RedisSettings = field(default_factory=RedisSettings)
    state: StateSettings = field(default_factory=StateSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    log: LogSettings = field(default_factory=LogSettings)

    @property
    def embedded_socket(self) -> Path:
        """Unix socket of the embedded Valkey."""
        return Path(self.runtime_dir) / "valkey.sock"

    @property
    def redis_url(self) -> str:
        """Address of the Redis in use, the embedded one included."""
        return self.redis.url or f"unix://{self.embedded_socket}"


# -- the keys, as declared above ----------------------------------------------------------------


class Key(typing.NamedTuple):
    """One setting: ``name`` is dotted ("control.ttl_s")."""

    name: str
    type: Any
    default: Any
    doc: str
    applies: Applies

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.replace(".", "_").upper()


def keys() -> dict[str, Key]:
    """Every setting by its dotted name, in the order of the default file."""
    return {key.name: key for key in _keys(Settings, "")}


def _keys(struct: type[Struct], prefix: str) -> Iterator[Key]:
    hints = typing.get_type_hints(struct, include_extras=True)
    for info in msgspec.structs.fields(struct):
        kind = hints[info.name]
        if isinstance(kind, type) and issubclass(kind, Struct):
            yield from _keys(kind, f"{prefix}{info.name}.")
        else:
            metas = getattr(kind, "__metadata__", ())
            doc = next((m.description for m in metas if m.description), "")
            applies = next(m.extra["applies"] for m in metas if m.extra)
            yield Key(prefix + info.name, kind, info.default, doc, applies)


def sections() -> dict[str, str]:
    """Sections of the file and what each is about, "" for the keys above all of them."""
    found = {"": "Where things are, and what is done."}
    for info in msgspec.structs.fields(Settings):
        if isinstance(info.type, type) and issubclass(info.type, Struct):
            found[info.name] = (info.type.__doc__ or "").strip()
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def replace(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Settings with other values under some dotted keys."""
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        if section:
            value = msgspec.structs.replace(getattr(settings, section), **{key: value})
        settings = msgspec.structs.replace(settings, **{section or key: value})
    return settings


# -- loading ------------------------------------------------------------------------------------


def load(
    path: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from a file, the environment and flags, each overriding the one before.

    Parameters
    ----------
    path : TOML file; None: none, which is allowed
    env : environment variables; None: the process' own
    overrides : by dotted key ("control.ttl_s"); strings are converted to the key's type, and
        None means "not given"

    Raises `ConfigError`.
    """
    env = os.environ if env is None else env
    known = keys()
    values: dict[str, Any] = {}
    if path is not None:
        for name, given in flatten(_read(Path(path))).items():
            key = _known(known, name, f"{path}: ")
            values[name] = _value(key, given, f"{path}: {name}", strict=True)
    for variable, key in _variables(known, env):
        values[key.name] = _value(key, env[variable], f"{variable} ({key.name})", strict=False)
    for name, given in (overrides or {}).items():
        if given is not None:
            key = _known(known, name, "")
            strict = not isinstance(given, str)
            values[name] = _value(key, given, name, strict=strict)
    return _resolve(values, env)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); `smartspec config defaults` prints a file "
            "to start from"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    sections = {name.partition(".")[0] for name in keys() if "." in name}
    for name in sections & tree.keys():
        if not isinstance(tree[name], dict):
            raise ConfigError(f"{path}: {name}: got {tree[name]!r}, expected a section [{name}]")
    return tree


def _known(known: Mapping[str, Key], name: str, where: str) -> Key:
    if name in known:
        return known[name]
    raise ConfigError(f"{where}{name}: no such setting{_suggestion(name, list(known))}")


def _suggestion(name: str, candidates: list[str]) -> str:
    # The key may be right and only its section wrong or missing.
    last = name.rpartition(".")[2]
    same = [one for one in candidates if one.rpartition(".")[2] == last]
    close = difflib.get_close_matches(name, same, n=1, cutoff=0.0)
    close = close or difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if close:
        where = " (above all sections)" if "." in name and "." not in close[0] else ""
        return f"; did you mean {close[0]}{where}?"
    return "; `smartspec config defaults` lists them all"


def _variables(known: Mapping[str, Key], env: Mapping[str, str]) -> Iterator[tuple[str, Key]]:
    by_variable = {key.env: key for key in known.values()}
    sections = tuple({f"{ENV_PREFIX}{n.partition('.')[0].upper()}_" for n in known if "." in n})
    for variable in sorted(env):
        if variable in by_variable:
            yield variable, by_variable[variable]
        elif variable.startswith(ENV_PREFIX):
            # Other variables with our prefix exist (SMARTSPEC_CONFIG): refuse what looks mistyped.
            close = difflib.get_close_matches(variable, list(by_variable), n=1, cutoff=0.9)
            if close or variable.startswith(sections):
                raise ConfigError(
                    f"{variable}: no such setting{_suggestion(variable, list(by_variable))}"
                )


_WORDS = {"float": "a number", "int": "an integer", "bool": "true or false", "str": "a string"}


def _value(key: Key, given: Any, where: str, strict: bool) -> Any:
    try:
        return msgspec.convert(given, key.type, strict=strict)
    except msgspec.ValidationError as error:
        if key.name == "redis.url" and isinstance(given, str):
            given = redacted(given)
        expected = str(error).removeprefix("Expected ")
        for kind, words in _WORDS.items():
            expected = expected.replace(f"`{kind}`", words)
        expected = re.sub(r"^Invalid enum value .*$", _choices(key.type), expected)
        expected = expected.partition(", got ")[0]
        raise ConfigError(f"{where}: got {given!r}, expected {expected}") from None


def _choices(kind: Any) -> str:
    return " or ".join(repr(value) for value in typing.get_args(typing.get_args(kind)[0]))


def _resolve(values: dict[str, Any], env: Mapping[str, str]) -> Settings:
    runtime_dir = str(values.get("runtime_dir") or default_runtime_dir(env))
    runtime_dir = str(Path(runtime_dir).expanduser().absolute())
    values["runtime_dir"] = runtime_dir
    values["endpoint"] = values.get("endpoint") or f"ipc://{runtime_dir}/engines.sock"
    values["bus_endpoint"] = values.get("bus_endpoint") or f"ipc://{runtime_dir}/bus.sock"
    directory = str(values.get("state.directory") or default_state_dir(env, runtime_dir))
    values["state.directory"] = str(Path(directory).expanduser().absolute())
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[key] = value
    settings = msgspec.convert(tree, Settings)
    encrypted = bool(settings.curve.directory) and not settings.insecure
    check_endpoint("endpoint", settings.endpoint, settings.insecure, encrypted)
    check_endpoint("bus_endpoint", settings.bus_endpoint, settings.insecure)
    if settings.insecure and settings.curve.directory:
        raise ConfigError("insecure: got true, expected false beside curve.directory")
    _check_together(settings)
    return settings


def default_runtime_dir(env: Mapping[str, str]) -> str:
    """Where sockets live when nothing is configured."""
    if given := env.get("RUNTIME_DIRECTORY"):
        return given.partition(":")[0]  # systemd lists several, separated by colons
    if given := env.get("XDG_RUNTIME_DIR"):
        return f"{given}/smartspec"
    return f"/tmp/smartspec-{os.getuid()}"


def default_state_dir(env: Mapping[str, str], runtime_dir: str) -> str:
    """Where learned state is kept when nothing is configured."""
    if given := env.get("STATE_DIRECTORY"):
        return given.partition(":")[0]
    if given := env.get("XDG_STATE_HOME"):
        return f"{given}/smartspec"
    if given := env.get("HOME"):
        return f"{given}/.local/state/smartspec"
    return f"{runtime_dir}/state"


def _check_together(settings: Settings) -> None:
    control = settings.control
    if control.heartbeat_s > control.ttl_s / 2:
        raise ConfigError(
            f"control.heartbeat_s: got {control.heartbeat_s}, expected at most half of "
            f"control.ttl_s ({control.ttl_s}): policies would expire between heartbeats"
        )
    if control.engine_timeout_s < control.ttl_s:
        raise ConfigError(
            f"control.engine_timeout_s: got {control.engine_timeout_s}, expected at least "
            f"control.ttl_s ({control.ttl_s})"
        )
    url = settings.redis.url
    if url:
        check_redis_url(url)
    if settings.redis.password_file and "@" in url:
        raise ConfigError(
            f"redis.password_file: got {settings.redis.password_file!r} and redis.url with a user "
            "or password, expected one of the two"
        )
    if settings.redis.username and not settings.redis.password_file:
        raise ConfigError(
            "redis.username: expected redis.password_file beside it, or both in redis.url"
        )
    if settings.redis.ca_file and not url.startswith("rediss://"):
        raise ConfigError("redis.ca_file: expected a redis.url of rediss:// beside it")
    if not url and len(os.fsencode(settings.embedded_socket)) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"runtime_dir: got {settings.runtime_dir!r}, too long for the Unix socket of the "
            f"embedded Valkey ({MAX_SOCKET_PATH} bytes): choose a shorter one, or set redis.url"
        )
    check_address("telemetry.prometheus_address", settings.telemetry.prometheus_address)
    if settings.endpoint == settings.bus_endpoint:
        raise ConfigError(
            f"bus_endpoint: got {settings.bus_endpoint!r}, expected another address than endpoint"
        )
