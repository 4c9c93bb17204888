"""Addresses to listen at: what may be given, and why an open one is refused."""

from __future__ import annotations

import ipaddress
import os

#: Longest path of a Unix socket on Linux (107 bytes); ZeroMQ and Redis sockets live in runtime_dir.
MAX_SOCKET_PATH = 107


class ConfigError(ValueError):
    """A setting that cannot be used: names the key, what was given and what was expected."""


def check_endpoint(name: str, given: str, insecure: bool, encrypted: bool = False) -> None:
    """Raise `ConfigError` unless ``given`` can be listened at without harm."""
    scheme, separator, address = given.partition("://")
    if scheme == "ipc" and address:
        if len(os.fsencode(address)) > MAX_SOCKET_PATH:
            raise ConfigError(
                f"{name}: got a path of {len(os.fsencode(address))} bytes ({address}), expected at "
                f"most {MAX_SOCKET_PATH}, the limit of Unix sockets: choose a shorter runtime_dir"
            )
        return
    if scheme != "tcp" or not separator:
        raise ConfigError(f"{name}: got {given!r}, expected ipc://PATH or tcp://127.0.0.1:PORT")
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{name}: got {given!r}, expected a port from 1 to 65535 after the host")
    if encrypted:
        return
    if not _is_loopback(host):
        raise ConfigError(
            f"{name}: got {given!r}, expected ipc://PATH or a loopback address: whoever reaches "
            "any other could steer the engines; with CURVE keys (`smartspec keys make`, "
            "curve.directory) endpoint may be any address"
        )
    if not insecure:
        raise ConfigError(
            f"{name}: got {given!r}, expected curve.directory (`smartspec keys make`) or "
            "insecure = true beside it: every local user can connect to a tcp:// address; ipc:// "
            "keeps others out by file permissions"
        )


def check_address(name: str, given: str) -> None:
    """Raise `ConfigError` unless ``given`` is an IP address."""
    try:
        ipaddress.ip_address(given)
    except ValueError:
        raise ConfigError(
            f"{name}: got {given!r}, expected an IP address, such as 127.0.0.1 or 0.0.0.0"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
