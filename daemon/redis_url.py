"""The address of a Redis server: what may be given, and how it is shown without its secrets."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from smartspec.daemon.admission.endpoints import ConfigError

#: What may follow a "?", besides `TLS_OPTIONS`. Others would change how we read and write.
OPTIONS = ("client_name", "db", "protocol")
TLS_OPTIONS = ("ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile")


def redacted(url: str) -> str:
    """``url`` without its password, so that it can be shown. It need not be a good one.

    >>> redacted("redis://user:secret@db:6379/0")
    'redis://user:***@db:6379/0'
    >>> redacted("redis://:se/cret@db?password=secret")
    'redis://***'
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    who, at, where = rest.rpartition("@")
    if any(character in who for character in "/?#"):
        return f"{scheme}{separator}***"  # where a secret ends cannot be told
    where = re.sub(r"[?#].*", "?***", where, flags=re.DOTALL)
    user, colon, _ = who.partition(":")
    who = f"{user}:***" if colon else "***" if at else ""
    return f"{scheme}{separator}{who}{at}{where}"


def check_redis_url(url: str) -> None:
    """Raise `ConfigError` unless a client of this address can be made.

    The message never has a part of the address that may be of a secret.
    """
    name = f"redis.url: got {redacted(url)!r}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its text quotes what may be part of a password
        parts, port = SplitResult("", "", "", "", ""), 0
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigError(
            f"{name}, expected redis://, rediss:// or unix://, or empty for an embedded Valkey"
        )
    if port == 0 or parts.fragment or "@" in parts.path + parts.query:
        raise ConfigError(
            f"{name}, expected a port from 1 to 65535, if any, after the host; in a user or "
            "password, / ? # [ ] and % are written %2F %3F %23 %5B %5D %25"
        )
    if parts.scheme == "unix" and (parts.hostname or not parts.path):
        raise ConfigError(f"{name}, expected unix:///PATH of a socket")
    database = parts.path.strip("/")
    if parts.scheme != "unix" and database and not (database.isascii() and database.isdigit()):
        raise ConfigError(f"{name}, expected the number of a database after the host, or nothing")
    allowed = OPTIONS + (TLS_OPTIONS if parts.scheme == "rediss" else ())
    for option, _ in parse_qsl(parts.query, keep_blank_values=True):
        if option in ("password", "username"):
            raise ConfigError(
                f"{name}, expected user and password before the host, or in redis.username and "
                "redis.password_file"
            )
        if option not in allowed:
            raise ConfigError(f"{name}, expected after the ? no more than {', '.join(allowed)}")
    try:
        unquote(parts.hostname or "").encode("idna")
        from redis import ConnectionPool

        ConnectionPool.from_url(url).make_connection()  # opens nothing
    except ModuleNotFoundError:  # of the extra `daemon`: whoever lacks it does not connect
        pass
    except Exception as error:  # whatever a client makes of it: better here than in the daemon
        kind = type(error).__name__
        raise ConfigError(f"{name}, of which no client can be made ({kind})") from None
