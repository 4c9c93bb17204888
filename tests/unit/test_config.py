"""Settings: precedence, and errors that say which key, what was given and what was expected."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from smartspec.daemon import config, config_text
from smartspec.daemon.config import ConfigError, Settings


def load(text: str | None = None, tmp: Path | None = None, **given: Any) -> Settings:
    path = None
    if text is not None:
        assert tmp is not None
        path = tmp / "smartspec.toml"
        path.write_text(text, "utf-8")
    return config.load(path, **{"env": {}, **given})


def test_defaults_are_those_of_the_documented_file(tmp_path: Path) -> None:
    assert load(config_text.default_toml(), tmp_path) == load()


def test_every_field_is_documented_in_the_default_file() -> None:
    paragraphs = config_text.default_toml().split("\n\n")
    for key in config.keys().values():
        name = key.name.rpartition(".")[2]
        assert len(key.doc) > 20, f"{key.name} has no description"
        assert any(
            p.startswith("# ") and p.splitlines()[-1].startswith(f"{name} = ") for p in paragraphs
        ), f"{key.name} does not follow a comment"


def test_reference_is_that_of_the_code(repository: Path) -> None:
    page = (repository / "docs" / "configuration.md").read_text("utf-8")
    assert page == config_text.reference(), "make it anew: smartspec config reference"


def test_every_key_is_in_the_reference_with_when_it_applies() -> None:
    rows = [line for line in config_text.reference().splitlines() if line.startswith("| `")]
    assert len(rows) == len(config.keys())
    for row, key in zip(rows, config.keys().values(), strict=True):
        assert row.startswith(f"| `{key.name.rpartition('.')[2]}` |")
        assert f"| {key.applies} |" in row


def test_replaced_values_leave_the_others_as_they_were() -> None:
    old = load()
    new = config.replace(old, {"control.ttl_s": 3.0, "log.format": "json", "mode": "observe"})
    assert config_text.differences(old, new) == {
        "mode": ("control", "observe"),
        "control.ttl_s": (1.0, 3.0),
        "log.format": ("auto", "json"),
    }


def test_password_is_not_shown_when_a_url_changes() -> None:
    words = config_text.change("redis.url", "redis://me:hunter2@a", "redis://me:hunter3@b")
    assert words == 'redis.url: "redis://me:***@a" -> "redis://me:***@b"'


def test_units_are_documented_when_a_name_carries_one() -> None:
    for key in config.keys().values():
        if key.name.endswith("_s"):
            assert "econd" in key.doc, key.name


def test_flags_override_environment_and_environment_overrides_file(tmp_path: Path) -> None:
    text = "[control]\nttl_s = 2\nheartbeat_s = 0.3\nfallback_s = 5"
    env = {"SMARTSPEC_CONTROL_HEARTBEAT_S": "0.4", "SMARTSPEC_CONTROL_FALLBACK_S": "6"}
    settings = load(text, tmp_path, env=env, overrides={"control.fallback_s": 7.0})
    control = settings.control
    assert (control.ttl_s, control.heartbeat_s, control.fallback_s) == (2.0, 0.4, 7.0)


def test_flags_that_were_not_given_change_nothing() -> None:
    assert load(overrides={"mode": None}) == load()


def test_environment_is_converted_to_the_type_of_the_key() -> None:
    env = {
        "SMARTSPEC_TELEMETRY_ENABLED": "false",
        "SMARTSPEC_TELEMETRY_PROMETHEUS_PORT": "0",
        "SMARTSPEC_MODE": "observe",
        "SMARTSPEC_CACHE": "of somebody else",
    }
    settings = load(env=env)
    assert settings.telemetry.enabled is False
    assert settings.telemetry.prometheus_port == 0
    assert settings.mode == "observe"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[control]\nttl_s = 'long'", ["control.ttl_s", "'long'", "a number"]),
        ("[control]\nttl_s = -1", ["control.ttl_s", "-1", "> 0"]),
        ("[control]\nttl_s = inf", ["control.ttl_s", "inf", "<="]),
        ("[control]\nttl_s = nan", ["control.ttl_s", "nan", "> 0"]),
        ("[control]\nttl = 1", ["control.ttl:", "did you mean control.ttl_s?"]),
        ("[contrl]\nttl_s = 1", ["contrl.ttl_s", "did you mean control.ttl_s?"]),
        ("ttl_s = 1", ["ttl_s", "did you mean", ".ttl_s?"]),
        ("[telemetry]\nmode = 'observe'", ["did you mean mode (above all sections)?"]),
        ("[log]\nenabled = false", ["did you mean state.enabled?"]),
        ("control = 1", ["control", "expected a section [control]"]),
        ("mode = 'stear'", ["mode", "'stear'", "'observe' or 'canary' or 'control'"]),
        ("mode = ", ["smartspec.toml", "not a TOML file"]),
        ("[log]\nformat = 'xml'", ["log.format", "'auto' or 'text' or 'json'"]),
        ("[telemetry]\nprometheus_port = 70000", ["telemetry.prometheus_port", "65535"]),
        ("[telemetry]\nprometheus_address = 'here'", ["telemetry.prometheus_address", "0.0.0.0"]),
        ("[state]\nenabled = 'yes'", ["state.enabled", "true or false"]),
        ("[control]\nheartbeat_s = 0.9", ["control.heartbeat_s", "0.9", "half", "1.0"]),
        ("[control]\nengine_timeout_s = 0.5", ["control.engine_timeout_s", "control.ttl_s"]),
        ("[redis]\nurl = 'db:6379'", ["redis.url", "redis://"]),
        ("endpoint = 'tcp://127.0.0.1:5555'", ["endpoint", "insecure = true"]),
        ("insecure = true\nendpoint = 'tcp://0.0.0.0:5555'", ["endpoint", "loopback", "CURVE"]),
        ("insecure = true\nbus_endpoint = 'tcp://db:5555'", ["bus_endpoint", "loopback"]),
        ("insecure = true\nendpoint = 'tcp://127.0.0.1'", ["endpoint", "port"]),
        ("endpoint = 'udp://x'", ["endpoint", "ipc://PATH"]),
        ("runtime_dir = '/" + "x" * 120 + "'", ["at most 107", "shorter runtime_dir"]),
        ("endpoint = 'ipc:///a'\nbus_endpoint = 'ipc:///a'", ["bus_endpoint", "another address"]),
    ],
)
def test_error_names_key_value_and_expectation_when_a_file_is_wrong(
    text: str, parts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        (
            {"SMARTSPEC_CONTROL_TTL_S": "soon"},
            ["SMARTSPEC_CONTROL_TTL_S (control.ttl_s)", "'soon'", "number"],
        ),
        (
            {"SMARTSPEC_CONTROL_TTL": "1"},
            ["SMARTSPEC_CONTROL_TTL", "did you mean SMARTSPEC_CONTROL_TTL_S?"],
        ),
        (
            {"SMARTSPEC_ENDPIONT": "ipc:///x"},
            ["SMARTSPEC_ENDPIONT", "did you mean SMARTSPEC_ENDPOINT?"],
        ),
    ],
)
def test_error_names_variable_when_the_environment_is_wrong(
    env: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(env=env)
    for part in parts:
        assert part in str(caught.value)


def test_missing_file_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config defaults"):
        config.load(tmp_path / "none.toml", env={})


def test_password_is_not_shown_when_a_url_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        load(overrides={"redis.url": "http://me:hunter2@db"})
    assert "hunter2" not in str(caught.value)
    settings = load(overrides={"redis.url": "redis://me:hunter2@db"})
    assert "hunter2" not in config_text.to_toml(settings)


def test_loopback_tcp_is_allowed_when_insecure_is_set() -> None:
    for address in ("127.0.0.1:5555", "localhost:5555", "[::1]:5555"):
        overrides = {"endpoint": f"tcp://{address}", "insecure": True}
        assert load(overrides=overrides).endpoint == f"tcp://{address}"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RUNTIME_DIRECTORY": "/run/smartspec:/run/b", "XDG_RUNTIME_DIR": "/x"}, "/run/smartspec"),
        ({"XDG_RUNTIME_DIR": "/run/user/5"}, "/run/user/5/smartspec"),
    ],
)
def test_paths_follow_the_runtime_directory(env: dict[str, str], expected: str) -> None:
    settings = load(env=env)
    assert settings.runtime_dir == expected
    assert settings.endpoint == f"ipc://{expected}/engines.sock"
    assert settings.bus_endpoint == f"ipc://{expected}/bus.sock"
    assert settings.redis_url == f"unix://{expected}/valkey.sock"


@pytest.mark.parametrize("head", ["# a comment\n", "", "mode = 'control'\n"])
def test_command_of_the_readme_sets_the_mode_whatever_the_file_has(
    repository: Path, tmp_path: Path, head: str
) -> None:
    readme = (repository / "README.md").read_text("utf-8")
    (line,) = (one for one in readme.splitlines() if one.strip().startswith("sed -i"))
    path = tmp_path / "smartspec.toml"
    path.write_text(f"{head}[log]\nlevel = 'error'\n", "utf-8")
    subprocess.run(line.replace("/etc/smartspec/smartspec.toml", str(path)), shell=True, check=True)
    settings = config.load(path, env={})
    assert (settings.mode, settings.log.level) == ("observe", "error")


def test_settings_in_force_can_be_read_back(tmp_path: Path) -> None:
    settings = load(overrides={"control.ttl_s": 3.5, "mode": "observe", "log.format": "json"})
    assert load(config_text.to_toml(settings), tmp_path) == settings


def test_differences_name_the_keys_that_changed() -> None:
    old, new = load(), load(overrides={"control.ttl_s": 3.0})
    assert config_text.differences(old, new) == {"control.ttl_s": (1.0, 3.0)}
