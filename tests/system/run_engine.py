"""A scripted engine as a process: steps in real time until killed, one line of JSON per step."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from scripted_engine import Costs, ScriptedEngine, hello

from smartspec.engine_adapter.link import EngineLink

STEP_S = 0.004


def main(endpoint: str, name: str, epoch: int, acceptance: float) -> None:
    link = EngineLink(endpoint, hello(name, epoch))
    costs = Costs(base_s=0.004, token_s=0.002)
    engine = ScriptedEngine(link, np.full(8, acceptance), costs)
    while True:
        began = time.perf_counter()
        engine.step()
        took_s = time.perf_counter() - began
        choice = engine.choices.pop()
        line = {"source": choice.source, "mean": float(choice.lengths.mean()), "took_s": took_s}
        print(json.dumps(line), flush=True)
        time.sleep(STEP_S)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
