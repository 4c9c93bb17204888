"""What the daemon holds of an engine does not grow with steps and requests."""

from __future__ import annotations

import gc
import sys

import msgspec
import numpy as np
import psutil
import pytest
from fakes import step_report
from scripted_engine import hello

from smartspec.daemon.engines import Engine
from smartspec.daemon.state.learned import encode
from smartspec.engine_adapter.messages import pack

pytestmark = pytest.mark.integration

BATCH = 4


def work(engine: Engine, first: int, steps: int, steps_per_request: int) -> None:
    """Steps ``first`` and on; a request leaves and another comes every ``steps_per_request``."""
    rng = np.random.default_rng(first)
    report = step_report(1, range(BATCH))
    version = 0
    for seq in range(first, first + steps):
        newest = seq // steps_per_request
        roster = None
        if seq % steps_per_request == 0 or seq == first:
            ids = range(newest, newest + BATCH)
            version = seq
            roster = msgspec.structs.replace(
                report.roster, version=seq, request_ids=pack(ids, "u64")
            )
        accepted = rng.integers(0, 3, BATCH)
        taken = msgspec.structs.replace(
            report,
            seq=seq,
            roster=roster,
            roster_version=version,
            policy_seq=engine.policy_seq,
            num_accepted=pack(accepted, "u8"),
            num_emitted=pack(accepted + 1, "u8"),
        )
        engine.learn(engine.observe(taken))
        engine.next_policy_seq(seq)


def held() -> tuple[int, int]:
    """Blocks that Python's allocator has given out, and bytes resident, numpy's among them."""
    gc.collect()
    return sys.getallocatedblocks(), psutil.Process().memory_info().rss


@pytest.mark.parametrize(
    "steps",
    [
        5_000,
        pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
)
def test_memory_does_not_grow_over_steps_and_requests(steps: int) -> None:
    """A request every tenth step, 100,000 in the long run, after more than are remembered.

    Traced, every allocation, a step takes four times as long.
    """
    engine = Engine(hello())
    before = 5_000  # a request each: the rows of 4,096 have all been used
    work(engine, 1, before, steps_per_request=1)
    num_bytes = len(encode(engine.learned.checkpoint()))
    blocks, resident = held()
    work(engine, before + 1, steps, steps_per_request=10)
    more_blocks, more_resident = np.subtract(held(), (blocks, resident)).tolist()
    print(f"{steps} steps: {more_blocks} blocks and {more_resident} bytes resident more,")
    print(f"checkpoints of {num_bytes} bytes")
    # One block for each of the 500 requests of the short run would be too many.
    assert more_blocks < 400
    assert more_resident < 4_000_000
    assert len(encode(engine.learned.checkpoint())) < num_bytes + 500
