"""The vLLM adapter's settings and refusals, which need no vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smartspec.engine_adapter.messages import MAX_BATCH, MAX_LENGTH
from smartspec.engine_adapter.vllm import facts
from smartspec.engine_adapter.vllm.settings import SettingsError, default_endpoint, keys_of, load


def test_additional_config_goes_before_the_environment() -> None:
    environment = {"SMARTSPEC_ENDPOINT": "ipc:///a", "SMARTSPEC_ENGINE_NAME": "gpu0"}
    found = load({"smartspec": {"endpoint": "ipc:///b"}}, environment)
    assert (found.endpoint, found.engine) == ("ipc:///b", "gpu0")


@pytest.mark.parametrize("given", [None, {}, {"other": 1}, "text"])
def test_nothing_of_ours_means_defaults(given: Any) -> None:
    found = load(given, {"SMARTSPEC_RUNTIME_DIR": "/x"})
    assert (found.endpoint, found.mode, found.lengths) == (
        "ipc:///x/engines.sock",
        "control",
        "auto",
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"smartspec": {"endpont": "ipc:///a"}}, "endpont.*the keys are endpoint"),
        ({"smartspec": {"mode": "on"}}, "mode"),
        ({"smartspec": {"endpoint": "/run/a.sock"}}, "endpoint.*expected an address"),
        ({"smartspec": "ipc:///a"}, "expected an object"),
        ({"smartspec": {"endpoint": "tcp://10.0.0.1:5560"}}, "keys: .*is encrypted"),
    ],
)
def test_wrong_setting_is_named(given: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load(given, {})


def test_keys_are_read_from_the_engine_s_file(tmp_path: Path) -> None:
    file = tmp_path / "gpu0.engine"
    file.write_text("".join(f"{name} {name[0] * 40}\n" for name in ("server", "public", "secret")))
    file.chmod(0o600)
    found = load(None, {"SMARTSPEC_ENDPOINT": "tcp://h:1", "SMARTSPEC_ENGINE_KEYS": str(file)})
    keys = keys_of(found)
    assert keys is not None and keys.server == b"s" * 40 and keys.public == b"p" * 40
    assert keys_of(load({"smartspec": {"endpoint": "tcp://127.0.0.1:1"}}, {})) is None
    file.chmod(0o644)
    with pytest.raises(SettingsError, match=r"keys: .*others may read it"):
        keys_of(found)


def test_default_endpoint_is_the_users_own_without_a_system_daemon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("smartspec.engine_adapter.vllm.settings.SYSTEM_RUNTIME_DIR", "/none")
    found = default_endpoint({"XDG_RUNTIME_DIR": "/run/user/7"})
    assert found == "ipc:///run/user/7/smartspec/engines.sock"


def test_default_endpoint_is_the_systems_while_its_daemon_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "smartspec.engine_adapter.vllm.settings.SYSTEM_RUNTIME_DIR", str(tmp_path)
    )  # which is there, and empty
    found = default_endpoint({"XDG_RUNTIME_DIR": "/run/user/7"})
    assert found == f"ipc://{tmp_path}/engines.sock"


@pytest.mark.parametrize(
    ("mode", "owner", "taken"), [(0o700, 0, True), (0o770, 0, False), (0o700, 1, False)]
)
def test_directory_in_tmp_is_taken_only_where_it_is_our_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int, owner: int, taken: bool
) -> None:
    monkeypatch.setattr("smartspec.engine_adapter.vllm.settings.SYSTEM_RUNTIME_DIR", "/none")
    monkeypatch.setattr("smartspec.engine_adapter.vllm.settings.SHARED", str(tmp_path))
    user = os.getuid() + owner
    monkeypatch.setattr(os, "getuid", lambda: user)
    assert default_endpoint({}) == "ipc:///none/engines.sock"
    folder = tmp_path / f"smartspec-{user}"
    folder.mkdir()
    folder.chmod(mode)
    assert default_endpoint({}) == f"ipc://{folder if taken else '/none'}/engines.sock"


def configuration(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "num_speculative_tokens": 5,
        "data_parallel_size": 1,
        "rank": 0,
        "max_num_seqs": 64,
        "runner_type": "generate",
        "has_inner_state": False,
    } | changes
    return SimpleNamespace(
        speculative_config=SimpleNamespace(method=values.get("method", "ngram")),
        num_speculative_tokens=values["num_speculative_tokens"],
        parallel_config=SimpleNamespace(
            data_parallel_size=values["data_parallel_size"],
            data_parallel_index=values["rank"],
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
        ),
        model_config=SimpleNamespace(
            model="models/small",
            dtype="torch.bfloat16",
            quantization=values.get("quantization"),
            runner_type=values["runner_type"],
            has_inner_state=values["has_inner_state"],
        ),
        cache_config=SimpleNamespace(cache_dtype=values.get("cache_dtype", "auto")),
        compilation_config=SimpleNamespace(),
        scheduler_config=SimpleNamespace(max_num_seqs=values["max_num_seqs"]),
    )


def test_usual_engine_is_steered() -> None:
    assert facts.refusal(configuration()) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_speculative_tokens": 0}, "no speculation"),
        ({"num_speculative_tokens": MAX_LENGTH + 1}, "num_speculative_tokens"),
        ({"data_parallel_size": 2}, "data_parallel_size"),
        ({"max_num_seqs": MAX_BATCH + 1}, "max-num-seqs"),
        ({"runner_type": "pooling"}, "does not generate"),
        ({"has_inner_state": True}, "recurrent state"),
    ],
)
def test_engine_that_cannot_be_steered_is_left_alone(changes: Any, words: str) -> None:
    assert words in (facts.refusal(configuration(**changes)) or "")


@pytest.mark.parametrize(
    ("given", "rank", "name"),
    [
        ("", 0, "vllm-small"),
        ("", 2, "vllm-small-dp2"),
        ("my", 0, "my"),
        ("my", 1, "my-dp1"),
    ],
)
def test_replicas_that_share_their_settings_have_names_of_their_own(
    given: str, rank: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "_device_name", lambda: "cpu")
    settings = load({}, {"SMARTSPEC_ENGINE_NAME": given} if given else {})
    assert facts.hello(configuration(rank=rank), settings).engine == name


@pytest.mark.parametrize(
    ("method", "keeps_up"),
    [("draft_model", True), ("eagle", True), ("ngram", False), ("medusa", False)],
)
def test_drafter_that_runs_a_pass_at_length_0_too_says_so(
    method: str, keeps_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "_device_name", lambda: "cpu")
    limits = facts.hello(configuration(method=method), load({}, {})).limits
    assert limits.keeps_up is keeps_up


def test_what_weights_and_cache_are_held_in_tells_engines_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(facts, "_device_name", lambda: "cpu")

    def dtype(**changes: str) -> str:
        return facts.hello(configuration(**changes), load({}, {})).fingerprint.dtype

    assert dtype() == "bfloat16"
    assert dtype(quantization="fp8", cache_dtype="fp8_e5m2") == "bfloat16 fp8 kv fp8_e5m2"
