"""The HTTP server as a process: starts the decode process, serves, drains and stops.

Exit status: 0 after SIGTERM or Ctrl-C; 1 when either process ended by itself; 2 when the decode
process could not start, or the address cannot be used.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from smartspec.engine_adapter.reference.http import authorization
from smartspec.engine_adapter.reference.http.app import Server, build_app
from smartspec.engine_adapter.reference.http.connections import RefuseConnection, bounded_protocol
from smartspec.engine_adapter.reference.http.engine_client import EngineClient
from smartspec.engine_adapter.reference.http.limits import Limits
from smartspec.engine_adapter.reference.http.metrics import Metrics
from smartspec.engine_adapter.reference.http.tokenization import Tokenization

log = logging.getLogger("smartspec.http")

EXIT_DIED = 1
EXIT_CANNOT_START = 2
RESPONSE_GRACE_S = 5.0  #: for responses that are complete to reach slow clients


class AddressError(ValueError):
    """The address to serve on cannot be used."""


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us: they begin a drain, which comes before its shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(address: str) -> socket.socket:
    """A socket for ``HOST:PORT``; port 0 is any free one. Raises `AddressError`."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise AddressError(f"--http {address}: expected HOST:PORT, such as 127.0.0.1:8000")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family, backlog=2048)
    except OSError as error:
        raise AddressError(f"--http {address}: cannot listen there: {error}") from error


def run_server(
    *,
    address: str,
    worker_command: Sequence[str],
    limits: Limits,
    api_key_file: Path | None = None,
    served_model_name: str | None = None,
) -> int:
    """Serve until SIGTERM, Ctrl-C or the end of the decode process. Returns the exit status.

    Parameters
    ----------
    address : HOST:PORT
    worker_command : starts the worker with its line protocol on standard input and output
    limits : see there
    api_key_file : keys of those who may use /v1; else $SMARTSPEC_API_KEY; neither: everybody
    served_model_name : the model's name outside; None: the worker's own

    Raises `AddressError` and `authorization.KeyFileError` before anything is started.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    keys = authorization.load_keys(api_key_file, os.environ)
    with listen(address) as sock:
        host, port = sock.getsockname()[:2]
        if not keys and not ipaddress.ip_address(host).is_loopback:
            log.warning("everybody who reaches %s may use it: give an API key", host)
        log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        return asyncio.run(_serve(sock, worker_command, limits, keys, served_model_name))


async def _serve(
    sock: socket.socket,
    worker_command: Sequence[str],
    limits: Limits,
    keys: tuple[str, ...],
    served_model_name: str | None,
) -> int:
    # The child reads no keys: what it does not have it cannot lose.
    env = {name: value for name, value in os.environ.items() if name != authorization.VARIABLE}
    metrics = Metrics()
    engine = EngineClient(
        worker_command, env=env, max_num_waiting=limits.max_num_waiting, observer=metrics
    )
    tokenization = Tokenization()
    server = Server(engine, tokenization, limits, metrics, served_model_name)
    app = build_app(server, keys)
    refuse = RefuseConnection(app, limits.max_num_connections, metrics)
    uvicorn_server = _Uvicorn(
        uvicorn.Config(
            app,
            http=bounded_protocol(limits.max_num_connections, limits.head_timeout_s, refuse),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=math.ceil(limits.head_timeout_s),
            timeout_graceful_shutdown=int(RESPONSE_GRACE_S),
        )
    )
    asked = _asked_to_stop(asyncio.get_running_loop())
    child = asyncio.create_task(engine.run())
    serving = asyncio.create_task(uvicorn_server.serve(sockets=[sock]))
    loading = asyncio.create_task(_load(server, tokenization))
    first = await _first(asked[0].wait(), child, serving, loading)
    while first is loading and loading.exception() is None:
        first = await _first(asked[0].wait(), child, serving)
    status = 0
    if child.done():
        status = EXIT_DIED if engine.facts is not None else EXIT_CANNOT_START
        log.error("the decode process ended with status %s", child.result())
    elif loading.done() and (error := loading.exception()) is not None:
        status = EXIT_CANNOT_START
        log.error("the tokenizer cannot be loaded: %s", error)
    else:
        engine.drain()
        log.info("stopping: %d answers still run", engine.num_in_flight)
        with contextlib.suppress(TimeoutError):
            # A second signal says that it cannot wait.
            async with asyncio.timeout(limits.drain_timeout_s):
                await _first(engine.idle(), asked[1].wait(), child)
        if child.done() or not asked[0].is_set():
            status = EXIT_DIED
    await engine.stop()
    uvicorn_server.should_exit = True
    await serving
    await child
    if not loading.done():
        loading.cancel()
    tokenization.close()
    log.info("stopped")
    return status


async def _load(server: Server, tokenization: Tokenization) -> None:
    """Load the tokenizer of the model that the child has loaded."""
    engine = server.engine
    await engine.started.wait()
    if engine.facts is None:
        return
    await tokenization.load(engine.facts.tokenizer)
    if engine.state == "ready":
        name = server.model().id
        server.metrics.name(name)
        log.info("ready: %s on %s", name, engine.facts.device)


def _asked_to_stop(loop: asyncio.AbstractEventLoop) -> tuple[asyncio.Event, asyncio.Event]:
    """Events that the first and the second SIGTERM or SIGINT set."""
    events = (asyncio.Event(), asyncio.Event())

    def hear() -> None:
        (events[1] if events[0].is_set() else events[0]).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, hear)
    return events


async def _first(*waits: object) -> asyncio.Future[object]:
    """The first that is done; the coroutines among the others are cancelled, tasks go on."""
    own = [asyncio.ensure_future(wait) for wait in waits]  # type: ignore[call-overload]
    try:
        done, _ = await asyncio.wait(own, return_when=asyncio.FIRST_COMPLETED)
        result: asyncio.Future[object] = next(iter(done))
        return result
    finally:
        for wait, future in zip(waits, own, strict=True):
            if future is not wait:
                future.cancel()
