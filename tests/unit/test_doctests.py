"""The numbers in docstrings are right."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import smartspec.estimators

MODULES = [
    "smartspec.daemon.goodput",
    "smartspec.engine_adapter.optimum",
    "smartspec.engine_adapter.lengths",
    "smartspec.engine_adapter.messages",
    "smartspec.engine_adapter.prices",
    "smartspec.engine_adapter.token_acceptance",
    "smartspec.engine_adapter.reference.calibration",
    "smartspec.engine_adapter.reference.candidates",
    "smartspec.engine_adapter.reference.draft_tree",
    "smartspec.engine_adapter.reference.growth",
    "smartspec.engine_adapter.reference.prompt_lookup",
    "smartspec.engine_adapter.reference.tree_lookup",
    "smartspec.engine_adapter.reference.http.turnover",
    *(
        module.name
        for module in pkgutil.walk_packages(smartspec.estimators.__path__, "smartspec.estimators.")
    ),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_hold_when_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_docstring_examples_exist_when_a_module_computes_lengths() -> None:
    examples = doctest.DocTestFinder().find(
        importlib.import_module("smartspec.engine_adapter.lengths")
    )
    assert any(test.examples for test in examples)
