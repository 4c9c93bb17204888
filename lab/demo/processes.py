"""The demonstration's processes: started apart, watched, and never left behind."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import msgspec

from smartspec.lab.demo.schedule import Prompt

STOP_TIMEOUT_S = 8.0
WORKER_GRACE_S = 2.0  #: a worker asked to stop answers what it has first; we do not wait for that
LOG_TAIL_LINES = 12

# A child must not outlive us, even where we are killed and can say nothing.
_START = (
    "import sys; from smartspec.daemon import cli; "
    "from smartspec.daemon.process import parent_death; "
    "parent_death.follow_parent(int(sys.argv.pop(1))); cli.main()"
)


class ProcessFailed(RuntimeError):
    """A process of ours ended or did not start. The message carries its last words."""


class Process:
    """`smartspec <arguments>` as a child with its standard error in a file.

    A session of its own: Ctrl-C in the terminal is for the demonstration, which then stops it.

    Parameters
    ----------
    name : for messages
    arguments : of the command `smartspec`
    log : file of its standard error; emptied first
    env : environment variables on top of our own
    pipes : whether its standard input and output are ours
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        log: Path,
        env: dict[str, str] | None = None,
        *,
        pipes: bool = False,
    ) -> None:
        self.name = name
        self.log = log
        pipe = subprocess.PIPE if pipes else subprocess.DEVNULL
        with log.open("wb") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", _START, str(os.getpid()), *arguments],
                stdin=pipe,
                stdout=pipe if pipes else stderr,
                stderr=stderr,
                env=_environment() | (env or {}),
                start_new_session=True,
            )

    def tail(self, num_lines: int = LOG_TAIL_LINES) -> str:
        """The last lines that it wrote to its standard error."""
        try:
            content = self.log.read_bytes()[-20_000:].decode("utf-8", "replace")
        except OSError:
            return ""
        # Progress bars rewrite their line: each state counts as one.
        lines = [line.rstrip() for line in content.replace("\r", "\n").split("\n")]
        return "\n".join([line for line in lines if line][-num_lines:])

    def check(self) -> None:
        """Raise `ProcessFailed` when it has ended."""
        code = self.popen.poll()
        if code is not None:
            raise ProcessFailed(self.obituary(code))

    def obituary(self, code: int) -> str:
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        words = self.tail()
        shown = f"; its last words ({self.log}):\n{words}" if words else f"; {self.log} is empty"
        return f"the {self.name} {how}{shown}"

    def stop(self) -> None:
        """End it: asked first, then made to. Idempotent."""
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.popen.kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # buffered words to a process that has gone
                    pass


def _environment() -> dict[str, str]:
    """Our own, without settings that were meant for another daemon."""
    kept = ("SMARTSPEC_CACHE",)
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SMARTSPEC_") or name in kept
    }


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class WorkerProcess:
    """The reference worker, spoken to in JSON lines; events are stamped as they arrive."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        arguments = ["worker", *arguments]
        self.process = Process("worker", arguments, log, pipes=True)
        self._encoder = msgspec.json.Encoder()
        self._events: queue.SimpleQueue[tuple[float, dict[str, Any]] | None] = queue.SimpleQueue()
        stdout = self.process.popen.stdout
        assert stdout is not None
        self._reader = threading.Thread(target=self._read, args=(stdout,), daemon=True)
        self._reader.start()

    def _read(self, stdout: IO[bytes]) -> None:
        decoder = msgspec.json.Decoder(dict[str, Any])
        try:
            for line in stdout:
                at_s = time.monotonic()
                try:
                    self._events.put((at_s, decoder.decode(line)))
                except msgspec.DecodeError:
                    continue  # a library that prints: not an event
        except ValueError:
            pass  # closed while it was read: we are stopping
        self._events.put(None)

    def wait_ready(self, on_wait: Callable[[float, str], None]) -> dict[str, Any]:
        """Its "ready" event; ``on_wait`` gets the seconds so far and its last line of progress."""
        began = time.monotonic()
        while True:
            got = self.poll(0.25)
            if got is not None and got[1].get("event") == "ready":
                return got[1]
            on_wait(time.monotonic() - began, self.process.tail(1))

    def poll(self, timeout_s: float) -> tuple[float, dict[str, Any]] | None:
        """The next event with its time, or None. Raises `ProcessFailed` when it has ended."""
        try:
            got = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if got is None:
            self._events.put(None)
            raise ProcessFailed(self.process.obituary(self.process.popen.wait()))
        return got

    def submit(self, request_id: str, prompt: Prompt, max_tokens: int) -> None:
        self._send(
            {
                "op": "submit",
                "id": request_id,
                "messages": [{"role": "user", "content": prompt.prompt}],
                "max_tokens": max_tokens,
                "temperature": 0,
                "seed": 0,
            }
        )

    def set_speculation(self, mode: str, length: int | None = None) -> None:
        """Who decides lengths from now on: "static" with ``length``, or "smartspec"."""
        order: dict[str, Any] = {"op": "speculation", "mode": mode}
        self._send(order if length is None else order | {"length": length})

    def hold(self) -> None:
        """Have it begin no further step; it says ``held`` when none is under way."""
        self._send({"op": "hold"})

    def resume(self) -> None:
        self._send({"op": "resume"})

    def _send(self, order: dict[str, Any]) -> None:
        stdin = self.process.popen.stdin
        assert stdin is not None
        try:
            stdin.write(self._encoder.encode(order) + b"\n")
            stdin.flush()
        except OSError:
            raise ProcessFailed(self.process.obituary(self.process.popen.wait())) from None

    def stop(self) -> None:
        """End it: asked first (an idle worker says goodbye at once), then made to."""
        try:
            self._send({"op": "stop"})
            self.process.popen.wait(WORKER_GRACE_S)
        except (ProcessFailed, subprocess.TimeoutExpired, ValueError):
            pass
        self.process.stop()


class DaemonProcess:
    """The daemon with its telemetry and embedded Valkey, in a runtime directory of its own."""

    START_TIMEOUT_S = 30.0

    def __init__(self, runtime_dir: Path, log: Path) -> None:
        self.endpoint, self.bus_endpoint = endpoints(runtime_dir)
        self._sockets = [runtime_dir / "engines.sock", runtime_dir / "bus.sock"]
        for path in self._sockets:
            path.unlink(missing_ok=True)  # so that those seen below are of this daemon
        self.process = Process(
            "daemon",
            # Every daemon starts cold: what an arm learned must not help another.
            [
                *("run", "--runtime-dir", str(runtime_dir), "--prometheus-port", "0"),
                *("--set", "state.enabled=false"),
            ],
            log,
        )

    def wait_ready(self) -> None:
        """Return once its sockets stand. Raises `ProcessFailed`."""
        deadline = time.monotonic() + self.START_TIMEOUT_S
        while not all(path.exists() for path in self._sockets):
            self.process.check()
            if time.monotonic() > deadline:
                raise ProcessFailed(
                    f"the daemon has not opened its sockets within {self.START_TIMEOUT_S:.0f} s; "
                    f"its last words ({self.process.log}):\n{self.process.tail()}"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.stop()


def endpoints(runtime_dir: Path) -> tuple[str, str]:
    """Where engines connect, and where the daemon publishes events."""
    return f"ipc://{runtime_dir}/engines.sock", f"ipc://{runtime_dir}/bus.sock"
