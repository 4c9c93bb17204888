"""Everything that may go wrong, in an order given by a seed, to real processes.

Three minutes by default; longer by SMARTSPEC_CHAOS_S (seconds), otherwise by SMARTSPEC_CHAOS_SEED:

    SMARTSPEC_CHAOS_S=1800 .venv/bin/pytest -q -s tests/system/test_chaos.py
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from chaos_rig import Rig

pytestmark = [pytest.mark.system, pytest.mark.slow]

DURATION_S = float(os.environ.get("SMARTSPEC_CHAOS_S", "150"))
SEED = int(os.environ.get("SMARTSPEC_CHAOS_SEED", "0"))
BACK_S = 2.0  #: after the last fault, control is back
STALL_S = 1.0  #: far less than any wait for a daemon, far more than a busy machine's hiccup
PATIENCE_S = 60.0
SETTLED_S = 10.0


@pytest.mark.timeout(DURATION_S + 400)
def test_nothing_crashes_waits_or_is_poisoned_when_everything_goes_wrong() -> None:
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="ss-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        rig = Rig(folder, stack)
        rig.recover(PATIENCE_S)
        time.sleep(SETTLED_S)
        before = {e.name: rig.seen(e.name, PATIENCE_S) for e in rig.engines}
        order = random.Random(SEED)
        took: dict[str, list[float]] = {}
        began = time.monotonic()
        while time.monotonic() - began < DURATION_S - 30:
            for fault in order.sample(rig.faults, len(rig.faults)):
                fault()
                took.setdefault(fault.__name__, []).append(rig.recover(PATIENCE_S))
                assert rig.daemon is not None and rig.daemon.poll() is None, rig.tail()
                assert all(e.process.poll() is None for e in rig.engines), fault.__name__
                time.sleep(order.uniform(0.0, 1.0))
        time.sleep(SETTLED_S)
        after = {e.name: rig.seen(e.name, PATIENCE_S) for e in rig.engines}
        slowest_s = max(engine.slowest_s for engine in rig.engines)
        for name, seconds in took.items():
            print(f"{name:28} x{len(seconds)}: control back in {max(seconds):.2f} s at most")
        print(f"slowest step {slowest_s:.3f} s, machine away {rig.gap.longest_s:.3f} s at most")
        print(f"before {before}\nafter  {after}")
        assert slowest_s < STALL_S + rig.gap.longest_s
        assert all(engine.num_errors == 0 for engine in rig.engines)
        every = [s for seconds in took.values() for s in seconds]
        assert statistics.median(every) < BACK_S
        assert max(every) < BACK_S + 2 * rig.gap.longest_s + 1.0, took
        assert rig.stored() == []
        for name, acceptance in (("gpu0", 0.6), ("gpu1", 0.3)):
            error_before = abs(before[name]["acceptance"] - acceptance)
            error_after = abs(after[name]["acceptance"] - acceptance)
            assert error_after < error_before + 0.05
            assert after[name]["error"] < before[name]["error"] + 0.03
        log = (folder / "daemon.log").read_text("utf-8", "replace")
        assert "Traceback" not in log, log[-3000:]
