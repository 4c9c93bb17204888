"""A scripted engine behind a bad network: between its link and the daemon frames are dropped,
doubled, swapped, held back and corrupted while the file that is named exists.

Prints a line of JSON per step, as run_engine.py does.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import zmq
from scripted_engine import Costs, ScriptedEngine, hello

from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.messages import Fingerprint

STEP_S = 0.02
SHARE = 0.02  #: of frames, for each of the five faults
HELD_S = 0.3
LOOK_S = 0.05


class BadNetwork(threading.Thread):
    """Carries frames between one engine and the daemon."""

    def __init__(self, near: str, far: str, bad: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self._near, self._far, self._bad = near, far, bad
        self._random = random.Random(seed)
        self._held: list[tuple[float, bool, bytes]] = []
        self._peer = b""

    def run(self) -> None:
        context = zmq.Context()
        self._front, self._back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        self._front.linger = self._back.linger = 0
        self._front.bind(self._near)
        self._back.immediate = 1  # nothing waits for a daemon that is not there
        self._back.reconnect_ivl = 50
        self._back.reconnect_ivl_max = 500
        self._back.connect(self._far)
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._back, zmq.POLLIN)
        bad, looked_at = False, 0.0
        while True:
            ready = dict(poller.poll(LOOK_S * 1000))
            now = time.monotonic()
            if now - looked_at > LOOK_S:
                bad, looked_at = self._bad.exists(), now
            if self._front in ready:
                self._peer, frame = self._front.recv_multipart()
                self._carry(True, frame, bad)
            if self._back in ready:
                self._carry(False, self._back.recv(), bad)
            due = [held for held in self._held if held[0] <= now or not bad]
            for held in due:
                self._held.remove(held)
                self._send(held[1], held[2])

    def _carry(self, up: bool, frame: bytes, bad: bool) -> None:
        kind = int(self._random.random() / SHARE) if bad else 9
        if kind == 0:
            return
        if kind == 1:
            self._send(up, frame)
        if kind in (2, 3):  # swapped with the next, or later than many
            after_s = STEP_S if kind == 2 else HELD_S
            self._held.append((time.monotonic() + after_s, up, frame))
            return
        if kind == 4:
            at = self._random.randrange(len(frame))
            flipped = frame[at] ^ (1 << self._random.randrange(8))
            frame = frame[:at] + bytes([flipped]) + frame[at + 1 :]
        self._send(up, frame)

    def _send(self, up: bool, frame: bytes) -> None:
        try:
            if up:
                self._back.send(frame, zmq.NOBLOCK)
            else:
                self._front.send_multipart((self._peer, frame), zmq.NOBLOCK)
        except zmq.Again:
            pass


def main(endpoint: str, folder: str, name: str, epoch: int, acceptance: float) -> None:
    near = f"ipc://{folder}/{name}.{epoch}"
    BadNetwork(near, endpoint, Path(folder) / "bad-network", epoch).start()
    # A kind of its own: engines of one kind would start from what the others have learned.
    kind = Fingerprint(target=name, proposer="lookup")
    link = EngineLink(near, msgspec.structs.replace(hello(name, epoch), fingerprint=kind))
    costs = Costs(base_s=0.004, token_s=0.002)
    engine = ScriptedEngine(link, np.full(8, acceptance), costs, seed=epoch)
    while True:
        began = time.perf_counter()
        engine.step()
        took_s = time.perf_counter() - began
        choice = engine.choices.pop()
        line = {"at": time.monotonic(), "source": choice.source, "took_s": took_s}
        print(json.dumps({**line, "errors": link.stats.num_errors}), flush=True)
        time.sleep(STEP_S)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
