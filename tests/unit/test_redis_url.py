"""The address of Redis: a bad one is refused with the settings, and none shows its secrets."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from smartspec.daemon import config, config_text
from smartspec.daemon.cli import app
from smartspec.daemon.config import ConfigError
from smartspec.daemon.redis_url import redacted
from smartspec.daemon.telemetry.redis_store import connect_as


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://:Pa/ss@h:1/0", "%2F"),
        ("redis://:Pa?ss@h:1/0", "%3F"),
        ("redis://:12#ss@h:1/0", "%23"),
        ("redis://:a[b@h", "%5B"),
        ("redis://h:99999/0", "a port from 1 to 65535"),
        ("redis://h:0/0", "a port from 1 to 65535"),
        ("redis://h/0?foo=1", "no more than client_name, db, protocol"),
        ("redis://h/0?decode_responses=true", "no more than client_name, db, protocol"),
        ("redis://h/0?ssl_certfile=/a", "no more than client_name, db, protocol"),
        ("redis://h/0?db=x", "no client can be made"),
        ("redis://h/0?protocol=9", "no client can be made"),
        ("redis://.h/0", "no client can be made"),
        ("redis://h/zero", "the number of a database"),
        ("redis://h/0?password=x", "before the host"),
        ("unix://", "unix:///PATH"),
        ("unix://relative.sock", "unix:///PATH"),
        ("db:6379", "redis://, rediss:// or unix://"),
    ],
)
def test_address_is_refused_when_no_client_could_use_it(url: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(env={}, overrides={"redis.url": url})
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://db:6379/2",
        "redis://me:a%2Fb@[::1]:6379",
        "redis://:a:b@c@db",
        "rediss://db/0?ssl_certfile=/a&ssl_keyfile=/b&client_name=x",
        "unix:///run/valkey.sock?db=3",
    ],
)
def test_address_is_taken_when_a_client_can_use_it(url: str) -> None:
    settings = config.load(env={}, overrides={"redis.url": url})
    connect_as(settings).connection_pool.make_connection()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://me:hunter2@db:6379/0", "redis://me:***@db:6379/0"),
        ("redis://:hunter2@db", "redis://:***@db"),
        ("redis://hunter2@db", "redis://***@db"),
        ("redis://:hun/ter2@db", "redis://***"),
        ("redis://me:hun@ter2@db/1", "redis://me:***@db/1"),
        ("redis://:hun?ter2@db", "redis://***"),
        ("redis://db/0?password=hunter2", "redis://db/0?***"),
        ("redis://db/0?password=hun@ter2", "redis://***"),
        ("redis://db/0#hunter2", "redis://db/0?***"),
        ("redis:/:hunter2@db", "***"),
        ("me:hunter2@db", "me:***@db"),
        ("unix:///run/valkey.sock", "unix:///run/valkey.sock"),
    ],
)
def test_secret_is_not_shown_wherever_it_stands(url: str, shown: str) -> None:
    assert redacted(url) == shown
    assert "ter2" not in config_text.change("redis.url", url, url)
    result = CliRunner().invoke(app, ["config", "show", "--set", f"redis.url={url}"])
    assert "ter2" not in result.output  # accepted or refused


def test_other_settings_are_shown_as_they_are() -> None:
    assert config_text.change("runtime_dir", "/run/a@b", "/c") == 'runtime_dir: "/run/a@b" -> "/c"'
