"""vLLM's schedulers, steered: what ``--scheduler-cls`` names.

Both forms do the same around each step (`Steering`). They stand apart because vLLM has two
schedulers, and takes the one that ``async_scheduling`` asks for; whichever of ours is named, the
one that fits is made.

Invariant: nothing in here can fail a request. What goes wrong is counted, logged once, and ends
control of this engine; vLLM runs on as configured.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.vllm import compatibility, facts, settings
from smartspec.engine_adapter.vllm.steering import Source, Steering, SteeringStats

log = logging.getLogger("vllm.smartspec")  # under vLLM's own, whose handlers print it


class Refusal(Exception):
    """This engine is not steered. The message says why."""


class Steered:
    """What is done around every step of a vLLM scheduler; mixed into both."""

    steering: Steering | None = None  #: None: not steered (any more)
    smartspec_stats: SteeringStats
    smartspec_refusal: str = ""  #: why this engine was never steered

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.smartspec_stats = SteeringStats()
        try:
            self.steering = self._begin()
            self.smartspec_stats = self.steering.stats
        except (Refusal, settings.SettingsError) as error:
            self.smartspec_refusal = str(error)
            log.warning("SmartSpec leaves this engine as it is configured: %s", error)
        except Exception as error:
            self.smartspec_refusal = str(error)
            self._end("starting")

    def _begin(self) -> Steering:
        config = self.vllm_config  # type: ignore[attr-defined]
        wanted = settings.load(config.additional_config, os.environ)
        if wanted.mode == "off":
            raise Refusal("mode is off")
        if problems := compatibility.problems():
            raise Refusal(
                f"vLLM {compatibility.version()} is not one that can be steered: "
                + "; ".join(problems)
                + f" (tested with {', '.join(compatibility.TESTED)})"
            )
        if reason := facts.refusal(config):
            raise Refusal(reason)
        steering = Steering(self, self.make_source(wanted), facts.method_of(config))
        log.info("SmartSpec: daemon expected at %s", wanted.endpoint)
        return steering

    def make_source(self, wanted: settings.Settings) -> Source:
        """What decides lengths: a link to the daemon. For tests to replace."""
        hello = facts.hello(self.vllm_config, wanted)  # type: ignore[attr-defined]
        return EngineLink(wanted.endpoint, hello, keys=settings.keys_of(wanted), logger=log)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's step, with lengths put in before."""
        if self.steering is None:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._contain("choosing lengths", self.steering.before_schedule)
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if self.steering is not None:
            self._contain("noting a step", self.steering.after_schedule, output)
        return output

    def get_grammar_bitmask(self, scheduler_output: Any) -> Any:
        """vLLM's masks, which it asks for once a step's model runs: then there is time."""
        if self.steering is not None:
            self._contain("reporting a step", self.steering.while_running, scheduler_output)
        return super().get_grammar_bitmask(scheduler_output)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """vLLM's update, with a note of what the step did."""
        step = None
        if self.steering is not None:
            step = self._contain(
                "reading a step",
                self.steering.before_update,
                scheduler_output,
                model_runner_output,
            )
        outputs = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        if self.steering is not None:
            self._contain("noting a step's end", self.steering.after_update, step)
        return outputs

    def shutdown(self) -> None:
        """Say goodbye to the daemon, and stop."""
        if self.steering is not None:
            self._contain("closing", self.steering.close)
        super().shutdown()  # type: ignore[misc]

    def _contain(self, what: str, action: Callable[..., Any], *args: Any) -> Any:
        try:
            return action(*args)
        except Exception:
            self._end(what)
            return None

    def _end(self, what: str) -> None:
        """Control is over for this engine."""
        self.smartspec_stats.num_errors += 1
        log.exception(
            "SmartSpec failed in %s; this engine runs on as configured, without control", what
        )
        steering, self.steering = self.steering, None
        if steering is not None:
            try:
                steering.close()
            except Exception:
                log.exception("SmartSpec could not close its link")


class SmartSpecScheduler(Steered, Scheduler):  # type: ignore[misc]
    """For engines with ``async_scheduling`` off: the CPU, ngram, suffix, custom proposers."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is SmartSpecScheduler and _is_async(args, kwargs):
            return SmartSpecAsyncScheduler(*args, **kwargs)
        return super().__new__(cls)


class SmartSpecAsyncScheduler(Steered, AsyncScheduler):  # type: ignore[misc]
    """For engines with ``async_scheduling`` on: GPUs with eagle, mtp or a draft model."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is SmartSpecAsyncScheduler and not _is_async(args, kwargs):
            return SmartSpecScheduler(*args, **kwargs)
        return super().__new__(cls)


def _is_async(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """What the configuration, vLLM's first argument, asks for."""
    config = kwargs.get("vllm_config", args[0] if args else None)
    return bool(config is not None and config.scheduler_config.async_scheduling)
