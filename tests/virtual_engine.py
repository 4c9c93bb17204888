"""An engine for the demonstration's player on a virtual clock: no model, no processes."""

from __future__ import annotations

from collections import deque
from typing import Any

from smartspec.lab.demo.schedule import Prompt


class VirtualEngine:
    """Decodes up to ``max_num_running`` requests; a step takes ``fixed_s + each_s * running``.

    A request's first step is its prompt; every request is answered in full.
    """

    def __init__(
        self, fixed_s: float = 0.02, each_s: float = 0.01, max_num_running: int = 4
    ) -> None:
        self.now_s = 0.0
        self.fixed_s, self.each_s, self.max_num_running = fixed_s, each_s, max_num_running
        self.waiting: deque[tuple[str, int]] = deque()
        self.running: dict[str, list[int]] = {}  # tokens so far, and wanted
        self.events: deque[tuple[float, dict[str, Any]]] = deque()
        self.submitted_at: dict[str, float] = {}
        self.fail: dict[str, Any] | None = None  # said instead of the first token
        self.stalled = False

    def clock(self) -> float:
        return self.now_s

    def submit(self, request_id: str, prompt: Prompt, max_tokens: int) -> None:
        self.submitted_at[request_id] = self.now_s
        self.waiting.append((request_id, max_tokens))

    def poll(self, timeout_s: float) -> tuple[float, dict[str, Any]] | None:
        if not self.events and (self.running or self.waiting) and not self.stalled:
            self._step()
        elif not self.events:
            self.now_s += max(timeout_s, 1e-3)
        return self.events.popleft() if self.events else None

    def _step(self) -> None:
        decoding = list(self.running)
        joined = []
        while self.waiting and len(self.running) < self.max_num_running:
            request_id, wanted = self.waiting.popleft()
            self.running[request_id] = [0, wanted]
            joined.append(request_id)
        step_s = self.fixed_s + self.each_s * len(decoding) + 0.005 * len(joined)
        self.now_s += step_s
        if self.fail is not None:
            self._say(**self.fail)
            return
        for request_id, state in list(self.running.items()):
            state[0] += 1
            self._say(event="token", id=request_id, text=f"t{state[0]} ", num_tokens=state[0])
            if state[0] == state[1]:
                del self.running[request_id]
                self._say(
                    event="finished",
                    id=request_id,
                    reason="length",
                    num_tokens=state[0],
                    num_drafted=0,
                    num_accepted=0,
                )
        self._say(
            event="step",
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_prefill_tokens=5 * len(joined),
            lengths=[0] * len(decoding),
            num_drafted=[0] * len(decoding),
            num_accepted=[0] * len(decoding),
            source="own",
            step_s=step_s,
            target_s=step_s,
            draft_s=0.0,
        )

    def _say(self, **event: Any) -> None:
        self.events.append((self.now_s, event))
