"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import HttpServer
from hypothesis import HealthCheck, settings
from loop_rig import Rig

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


# No test starts from what another, or the user's own daemon, has learned; tests of it say so.
os.environ["SMARTSPEC_STATE_ENABLED"] = "false"


@pytest.fixture
def rig() -> Rig:
    """A control loop with one engine, connected."""
    made = Rig()
    made.connect()
    return made


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """Not tmp_path: its names may exceed what a Unix socket's path can hold."""
    with tempfile.TemporaryDirectory(prefix="ss-", ignore_cleanup_errors=True) as path:
        yield Path(path)


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


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a small random model with a tokenizer of bytes, for worker processes."""
    from tiny_models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def http_server(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpServer]:
    """One server for all tests that leave it as they found it."""
    log = tmp_path_factory.mktemp("http") / "server.log"
    server = HttpServer(
        tiny_model_dir, log, "--max-num-waiting", "400", "--max-model-len", "256",
        "--max-num-running", "32",
    )  # fmt: skip
    try:
        yield server.wait_ready()
        assert server.stop() == 0, log.read_text()
    finally:
        server.close()
