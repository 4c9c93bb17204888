"""Examines a host end to end, from the directory of the sockets to the engines' last policies.

Looks only: connects to nothing that would notice, but Redis, Prometheus and the event bus. Every
finding that is not good says what to do. Exit codes: 0 nothing has failed, 1 something has.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import redis
from msgspec import Struct

from smartspec.daemon.admission import curve_keys
from smartspec.daemon.admission.curve_keys import KeyFileError
from smartspec.daemon.config import Settings
from smartspec.daemon.event_bus import LoopEvent, subscribe
from smartspec.daemon.redis_url import redacted
from smartspec.daemon.system_service import listens
from smartspec.daemon.telemetry.metric_ids import STARTED
from smartspec.daemon.telemetry.redis_store import Keys, connect_as
from smartspec.daemon.views import inspect
from smartspec.daemon.views.inspect import EXIT_NO_ENGINE, InspectError, View
from smartspec.engine_adapter.messages import STEERED

EXIT_FAILED = 1
VLLM_TIMEOUT_S = 120.0  #: to import it
LISTEN_S = 4.0  #: to the daemon, which speaks once a second
MIN_REDIS = (6, 2)  #: the oldest that the tests' commands and ACLs are known from
MAX_SKEW_S = 1.0  #: between this clock and that of Redis
MIN_FREE_BYTES = 64 << 20
MAX_STALENESS = 4  #: steps; two are usual
MAX_ERROR = 0.25  #: of predicted step times


class Finding(Struct, frozen=True, kw_only=True):
    """What one look has shown. ``advice``: what to do, empty when all is well."""

    check: str
    state: Literal["ok", "warning", "failed"]
    text: str
    advice: str = ""


def good(check: str, text: str) -> Finding:
    return Finding(check=check, state="ok", text=text)


def warning(check: str, text: str, advice: str) -> Finding:
    return Finding(check=check, state="warning", text=text, advice=advice)


def failed(check: str, text: str, advice: str) -> Finding:
    return Finding(check=check, state="failed", text=text, advice=advice)


def examine(settings: Settings, engine: str | None = None) -> Iterator[Finding]:
    """All findings, one after the other. ``engine``: look at this one only; None: at all."""
    yield from check_runtime_dir(settings)
    yield from check_endpoint(settings)
    yield from check_keys(settings)
    heard = yield from check_daemon(settings, LISTEN_S)
    yield from check_redis(settings)
    yield from check_prometheus(settings, heard)
    yield from check_state(settings)
    yield from check_engines(settings, engine, time.time())


# -- the host -----------------------------------------------------------------------------------


def check_runtime_dir(settings: Settings) -> Iterator[Finding]:
    path = Path(settings.runtime_dir)
    start = "start the daemon: `systemctl start smartspec`, or `smartspec run`"
    try:
        found = path.stat()
    except FileNotFoundError:
        yield failed("runtime_dir", f"{path} does not exist", start)
        return
    except PermissionError:
        join = "run this as the daemon's user, or a member of the engines' group"
        yield failed("runtime_dir", f"{path} may not be looked into by this user", join)
        return
    if not stat.S_ISDIR(found.st_mode):
        yield failed("runtime_dir", f"{path} is no directory", "remove it, or choose another one")
    elif found.st_mode & stat.S_IWOTH:
        text = f"{path} may be written by everyone"
        yield failed("runtime_dir", text, f"`chmod o-w {path}`, then restart the daemon")
    else:
        yield good("runtime_dir", f"{path}, mode {found.st_mode & 0o777:03o}")


def check_endpoint(settings: Settings) -> Iterator[Finding]:
    """Somebody listens where engines connect, and this user may connect."""
    scheme, _, address = settings.endpoint.partition("://")
    start = "is the daemon running, with the same endpoint? `smartspec config show` prints it"
    if scheme == "tcp":
        host, _, port = address.rpartition(":")
        host = {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1"}.get(host, host.strip("[]"))
        try:
            socket.create_connection((host, int(port)), timeout=2.0).close()
        except OSError as error:
            yield failed("endpoint", f"nobody listens at {settings.endpoint} ({error})", start)
        else:
            yield good("endpoint", f"the daemon listens at {settings.endpoint}")
        return
    path = Path(address)
    try:
        found = path.stat()
    except OSError as error:
        yield failed("endpoint", f"{path}: {error.strerror}", start)
        return
    if not stat.S_ISSOCK(found.st_mode):
        yield failed("endpoint", f"{path} is no socket", "remove it, and restart the daemon")
    elif found.st_mode & 0o007:
        text = f"{path} has mode {found.st_mode & 0o777:03o}: every local user may steer engines"
        yield failed("endpoint", text, f"`chmod o= {path}`")
    elif not os.access(path, os.R_OK | os.W_OK):
        advice = "add the engine's user to its group (`usermod --append --groups GROUP USER`)"
        text = f"{path} belongs to user {found.st_uid} and group {found.st_gid}: not open to us"
        yield failed("endpoint", text, advice)
    elif not listens(path):
        text = f"{path} is left over: nobody listens"
        yield failed("endpoint", text, start)
    else:
        yield good("endpoint", f"{path}, mode {found.st_mode & 0o777:03o}, somebody listens")


def check_keys(settings: Settings) -> Iterator[Finding]:
    if not settings.curve.directory:
        return
    directory = Path(settings.curve.directory)
    try:
        keys = curve_keys.read(directory)
    except KeyFileError as error:
        yield failed("keys", str(error), "or run this as the daemon's user, who owns them")
        return
    if not keys.allowed:
        text = f"{directory}: no engine is on the list"
        yield failed("keys", text, "`smartspec keys add NAME`, then reload the daemon")
    else:
        yield good("keys", f"{directory}: {len(keys.allowed)} engines are on the list")


# -- the daemon ---------------------------------------------------------------------------------


def check_daemon(settings: Settings, listen_s: float) -> Generator[Finding, None, LoopEvent | None]:
    """The loop turns, and decides when it is told of steps. Returns its last word, if any."""
    subscriber = subscribe(settings.bus_endpoint, ("loop",))
    heard: list[LoopEvent] = []
    deadline = time.monotonic() + listen_s
    try:
        while len(heard) < 2 and (left_s := deadline - time.monotonic()) > 0:
            event = subscriber.poll(left_s)
            if isinstance(event, LoopEvent):
                heard.append(event)
        num_bad = subscriber.num_bad
    finally:
        subscriber.close()
    if not heard:
        why = "its events are of another release" if num_bad else _why_silent(settings)
        text = f"nothing was heard at {settings.bus_endpoint} for {listen_s:g} s: {why}"
        log = "look at its log (`journalctl -u smartspec`)"
        yield failed("daemon", text, f"{log}; start it, or restart it if it is stuck")
        return None
    last = heard[-1]
    yield good("daemon", f"alive, {settings.mode} mode by these settings")
    skew_s = abs(time.time() - last.t_s)
    if skew_s > LISTEN_S + MAX_SKEW_S:
        text = f"the daemon's time of day differs by {skew_s:.0f} s"
        yield warning("clock", text, "ages will be wrong; was the clock just set?")
    reports, decisions = (
        last.counters.get(name, 0) - heard[0].counters.get(name, 0)
        for name in ("reports", "decisions")
    )
    if reports and not decisions:
        text = f"{reports} reports came while we listened, and nothing was decided"
        yield failed("deciding", text, "look at its log, and at the events in `smartspec inspect`")
    elif not reports:
        yield good("deciding", "nothing to decide: no engine works")
    else:
        yield good("deciding", f"{decisions} decisions for {reports} reports while we listened")
    for name, words, advice in (
        ("connections_denied", "connections were denied: not on the list", "`smartspec keys add`"),
        ("states_refused", "learned states were refused at its start", "`smartspec state`"),
        (
            "frames_refused",
            "frames could not be believed",
            "its log (`journalctl -u smartspec`) says whose, and what is wrong with them",
        ),
    ):
        if count := last.counters.get(name, 0):
            yield warning("daemon", f"{count} {words}", advice)
    return last


def _why_silent(settings: Settings) -> str:
    lock = Path(settings.runtime_dir) / "daemon.lock"
    try:
        pid = int(lock.read_text().strip())
    except FileNotFoundError:
        return "no daemon has run there"
    except (OSError, ValueError):
        return "whether one runs cannot be told by this user"
    if Path(f"/proc/{pid}").exists():
        return f"process {pid} is there and does not turn"
    return f"process {pid}, which ran there, is gone"


# -- what is beside it --------------------------------------------------------------------------


def check_redis(settings: Settings) -> Iterator[Finding]:
    where = redacted(settings.redis_url)
    client = connect_as(settings, timeout_s=2.0)
    keys = Keys(settings.redis.key_prefix)
    try:
        client.ping()
        heard: Any = client.hget(keys.daemon, "t_s")
        lost: Any = client.hget(keys.daemon, "num_lost")
        yield from _redis_server(client, where)
    except redis.RedisError as error:
        if not settings.telemetry.enabled and not settings.redis.url:
            yield warning(
                "redis",
                "there is none: telemetry.enabled is false, and no `smartspec telemetry` runs",
                "enable it, or start that, to see anything in `top` and `inspect`",
            )
            return
        advice = (
            "check redis.url, its user, password_file and ca_file"
            if settings.redis.url
            else "is `smartspec run` running, with the same runtime_dir?"
        )
        yield failed("redis", f"{where} cannot be read ({error})", advice)
        return
    finally:
        client.close()
    try:
        age_s = time.time() - float(heard)
    except (TypeError, ValueError):
        text = f"nothing was ever written under {settings.redis.key_prefix!r}"
        yield failed("telemetry", text, "is redis.key_prefix the daemon's? look at its log")
        return
    if age_s > inspect.STALE_S:
        text = f"nothing was written to Redis for {age_s:.0f} s"
        yield failed("telemetry", text, "look at the log of the telemetry process")
    else:
        yield good("telemetry", f"writes to Redis, {max(0.0, age_s):.1f} s ago")
    if lost and lost != b"0":
        text = f"{int(lost)} events never reached Redis"
        yield warning("telemetry", text, "it was away or too slow for too long; see docs/redis.md")


def _redis_server(client: redis.Redis, where: str) -> Iterator[Finding]:
    try:
        server: Any = client.info("server")
        now: Any = client.time()
    except redis.ResponseError as error:  # an ACL user need not be told
        yield good("redis", f"{where} answers; its version is not for us to know ({error})")
        return
    name = "Valkey" if "valkey_version" in server else "Redis"
    version = str(server.get("valkey_version") or server.get("redis_version", "?"))
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if parts < MIN_REDIS:
        yield warning(
            "redis",
            f"{where} is {name} {version}",
            f"{'.'.join(map(str, MIN_REDIS))} or newer is what was tried",
        )
    else:
        yield good("redis", f"{where} is {name} {version}")
    skew_s = abs(time.time() - (now[0] + now[1] / 1e6))
    if skew_s > MAX_SKEW_S:
        text = f"this clock and that of Redis differ by {skew_s:.1f} s"
        yield warning("clock", text, "let both hosts keep time (chrony, systemd-timesyncd)")


def check_prometheus(settings: Settings, heard: LoopEvent | None) -> Iterator[Finding]:
    """Metrics are served, and are those of the daemon that was ``heard``."""
    port = settings.telemetry.prometheus_port
    if not port:
        return
    address = settings.telemetry.prometheus_address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:
            page = answer.read().decode("utf-8", "replace")
    except (OSError, urllib.error.URLError) as error:
        if not settings.telemetry.enabled:
            return  # and none is wanted
        text = f"{url} cannot be scraped ({error})"
        yield warning("prometheus", text, "telemetry.prometheus_port may be taken: see the log")
        return
    served = re.search(rf"^{STARTED.id} (\S+)$", page, re.MULTILINE)
    if served is None:
        text = f"{url} is served by something else"
    elif heard is not None and float(served.group(1)) != heard.started_s:
        text = f"{url} shows another daemon"
    else:
        yield good("prometheus", f"{url} is served")
        return
    if settings.telemetry.enabled:
        yield warning("prometheus", text, "choose another telemetry.prometheus_port")


def check_state(settings: Settings) -> Iterator[Finding]:
    if not settings.state.enabled:
        return
    path = Path(settings.state.directory)
    try:
        free = shutil.disk_usage(path).free
    except FileNotFoundError:
        yield good("state", f"{path}: nothing was learned and saved yet")
        return
    except OSError as error:
        text = f"{path}: {error.strerror}"
        yield warning("state", text, "run this as the daemon's user, who owns it")
        return
    if free < MIN_FREE_BYTES:
        text = f"{path}: {free >> 20} MB are free"
        yield warning("state", text, "make room, or what is learned is not saved")
    else:
        yield good("state", f"{path}: {free >> 20} MB are free")


# -- engines ------------------------------------------------------------------------------------


def check_engines(settings: Settings, engine: str | None, now: float) -> Iterator[Finding]:
    try:
        views = inspect.read(settings, engine, now)
    except InspectError as error:
        if error.code != EXIT_NO_ENGINE:
            return  # Redis has been spoken of
        state: Any = failed if engine else warning
        advice = "`smartspec config show` prints what daemon and engine must agree on"
        yield state("engines", str(error), advice)
        return
    for view in views:
        yield from check_engine(view)


def check_engine(view: View) -> Iterator[Finding]:
    """An engine is connected, its policies reach it in time, and rest on good predictions."""
    state = view.state
    check = f"engine {state.engine}"
    condition = inspect.condition(view)
    if state.state == "quarantined":
        why = next((e.text for e in view.events if e.text), "what it reported cannot be true")
        yield failed(
            check, f"in quarantine: {why}", "mend its adapter; it is let in again by itself"
        )
        return
    if state.state != "connected":
        yield warning(check, f"{state.state}, {view.age_s:.0f} s ago", "start it if it should run")
        return
    if view.age_s > inspect.STALE_S or view.daemon_age_s is None:
        yield good(check, f"{condition}: nothing to judge by since {view.age_s:.0f} s")
        return
    trouble = False
    if state.steering and state.source not in (*STEERED, None):
        trouble = True
        yield failed(
            check,
            f"policies are sent, but its last step chose by {state.source!r}",
            "do they reach it? is its clock stopped, or control.ttl_s too short for its steps?",
        )
    if state.staleness_steps is not None and state.staleness_steps > MAX_STALENESS:
        trouble = True
        text = f"policies are {state.staleness_steps} steps old when they act"
        yield warning(check, text, "the daemon lacks processor time: give it a core")
    if state.prediction_error is not None and state.prediction_error > MAX_ERROR:
        trouble = True
        text = f"step times are mispredicted by {100 * state.prediction_error:.0f}%"
        yield warning(check, text, "does something else use the accelerator?")
    if not trouble:
        words = f"{condition}, {state.num_running} requests running"
        yield good(check, f"{words}, last heard {view.age_s:.1f} s ago")


# -- the command --------------------------------------------------------------------------------


def examine_vllm(python: str) -> Iterator[Finding]:
    """What the adapter says of vLLM, when run with vLLM's Python."""
    command = [python, "-m", "smartspec.engine_adapter.vllm.doctor"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=VLLM_TIMEOUT_S)
    except OSError as error:
        text = f"{python} cannot be run: {error.strerror}"
        yield failed("python", text, "name the Python that runs vLLM: --python PATH")
        return
    except subprocess.TimeoutExpired:
        text = f"{python} has not imported vLLM in {VLLM_TIMEOUT_S:g} s"
        yield failed("vllm", text, f"`{python} -c 'import vllm'` must work")
        return
    try:
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        yield from [msgspec.json.decode(line, type=Finding) for line in lines]
    except msgspec.DecodeError as error:
        yield failed("smartspec", f"of another release there: {error}", "install the same one")
        return
    if done.returncode:
        words = done.stderr.strip().rpartition("\n")[2]
        advice = f"`{python} -m pip install smartspec` adds it, and nothing that vLLM lacks"
        yield failed("smartspec", f"does not run with {python}: {words}", advice)


def run(settings: Settings, engine: str | None = None, as_json: bool = False) -> int:
    """Print what is found; returns the exit code."""
    return show(examine(settings, engine), as_json)


def show(found: Iterable[Finding], as_json: bool = False) -> int:
    """Print findings as they come; returns the exit code."""
    findings = []
    for finding in found:
        findings.append(finding)
        if not as_json:
            print(line(finding), flush=True)
    count = sum(finding.state == "failed" for finding in findings)
    if as_json:
        content = {"ok": not count, "findings": findings}
        print(msgspec.json.format(msgspec.json.encode(content), indent=2).decode())
    elif count:
        print(f"{count} of {len(findings)} checks failed", file=sys.stderr)
    return EXIT_FAILED if count else 0


def line(finding: Finding) -> str:
    """A finding for people; what comes from elsewhere cannot steer the terminal.

    >>> print(line(warning("state", "2 MB are free", "make room")))
    warning state        2 MB are free
                         -> make room
    """
    text = f"{finding.state:7} {finding.check:12} {finding.text}"
    lines = [text] + ([f"{'':20} -> {finding.advice}"] if finding.advice else [])
    return "\n".join(str(inspect.shown(one)) for one in lines)
