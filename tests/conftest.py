"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every run, on machines of any speed; HYPOTHESIS_PROFILE=explore looks for
# new ones.
settings.register_profile(
    "reproducible",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reproducible"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout that the tests stand in."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of recorded traces, profiles and prompts, which are not part of the repository."""
    named = os.environ.get("SMARTSPEC_DATA")
    if not named:
        pytest.skip("set SMARTSPEC_DATA to the folder of recorded traces, profiles and prompts")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"SMARTSPEC_DATA names no folder: {folder}")
    return folder
