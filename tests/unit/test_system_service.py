"""Where commands look that are told of no daemon: the user's own if one runs, else the system's."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smartspec.daemon import cli_options, system_service
from smartspec.daemon.cli import app
from smartspec.daemon.config import Settings


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with the service installed, and a user with a session."""
    for name, folder in (("RUNTIME_DIR", "run"), ("STATE_DIRECTORY", "state")):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(system_service, name, tmp_path / folder)
    monkeypatch.setattr(system_service, "FILE", tmp_path / "system.toml")
    for name in ("RUNTIME_DIRECTORY", "STATE_DIRECTORY", "SMARTSPEC_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    return tmp_path


def test_commands_find_the_systems_daemon_with_its_settings(host: Path) -> None:
    system_service.FILE.write_text("[redis]\nkey_prefix = 'x:'\n", "utf-8")
    settings = cli_options.settings_beside(None, None)
    assert settings.runtime_dir == str(host / "run")
    assert settings.state.directory == str(host / "state")
    assert settings.redis.key_prefix == "x:"
    done = CliRunner().invoke(app, ["state"])
    assert str(host / "state") in done.output.replace("\n", "")


def test_file_that_this_user_may_not_read_is_left_out(host: Path) -> None:
    assert cli_options.settings_beside(None, None).runtime_dir == str(host / "run")


def own(host: Path) -> Settings:
    settings = cli_options.settings_beside(None, None)
    assert settings.state.directory == str(host / "home" / "smartspec")
    return settings


def test_own_daemon_goes_before_the_systems_while_it_runs(host: Path) -> None:
    folder = host / "user" / "smartspec"
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "commands.sock"))
        listener.listen()
        assert own(host).runtime_dir == str(folder)
    # What is left of one that has ended does not count.
    assert cli_options.settings_beside(None, None).runtime_dir == str(host / "run")


@pytest.mark.parametrize("how", ["flag", "variable", "file", "service"])
def test_directory_that_is_named_is_the_one(
    host: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = None
    if how == "variable":
        monkeypatch.setenv("SMARTSPEC_RUNTIME_DIR", "/named")
    if how == "service":
        monkeypatch.setenv("RUNTIME_DIRECTORY", "/named")
    if how == "file":
        path = host / "own.toml"
        path.write_text("runtime_dir = '/named'", "utf-8")
    given = {"runtime_dir": "/named"} if how == "flag" else {}
    settings = cli_options.settings_beside(path, None, **given)
    assert settings.runtime_dir == "/named"
    assert settings.state.directory == str(host / "home" / "smartspec")


def test_daemon_itself_is_not_moved(host: Path) -> None:
    settings = cli_options.load_settings(None, None)
    assert settings.runtime_dir == str(host / "user" / "smartspec")


def test_host_without_the_service_has_the_users_own(host: Path) -> None:
    (host / "run").rmdir()
    assert own(host).runtime_dir == str(host / "user" / "smartspec")
