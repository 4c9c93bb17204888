"""Start a worker process: load the models, build the worker, serve."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import torch

from smartspec.engine_adapter.curve import EngineKeys
from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.messages import Fingerprint, Hello, Limits
from smartspec.engine_adapter.reference import feature_head
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.commands import Mode
from smartspec.engine_adapter.reference.draft_model import DraftModel
from smartspec.engine_adapter.reference.feature_draft import FeatureChain, FeatureDraft
from smartspec.engine_adapter.reference.line_server import LineServer, LinkFactory
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.proposer import NoProposer, Proposer
from smartspec.engine_adapter.reference.replies import Ready
from smartspec.engine_adapter.reference.tree_draft_model import TreeDraftModel
from smartspec.engine_adapter.reference.tree_lookup import TreeLookup
from smartspec.engine_adapter.reference.worker import Worker

ProposerName: TypeAlias = Literal[
    "lookup", "draft", "eagle", "eagle-chain", "lookup-tree", "draft-tree", "none"
]

KNOWN_FIRST = (PromptLookup.name, TreeLookup.name)  #: drafts exist before lengths are chosen
#: Made for the default model (docs/drafter.md).
DEFAULT_DRAFTER = Path(__file__).with_name(f"{models.DEFAULT_MODEL}-drafter.safetensors")
TREES = (TreeLookup.name, TreeDraftModel.name, FeatureDraft.name)
#: Can stop and cut drafts by their confidences.
CONFIDENT = (DraftModel.name, TreeDraftModel.name, FeatureDraft.name, FeatureChain.name)
HEADS = (FeatureDraft.name, FeatureChain.name)  #: draft with a head on the target's states


def make_proposer(
    name: ProposerName,
    max_length: int,
    target: models.LoadedModel,
    *,
    draft_model: str | None = None,
    draft_drop_layers: Sequence[int] = (),
    drafter: Path | None = None,
    max_num_running: int,
    max_model_len: int,
) -> Proposer:
    """The proposer by name; a draft model is the target without some layers, or a named model.

    ``drafter`` : of eagle and eagle-chain, a file of `smartspec distill`; None: that of the default
    model
    """
    if name == "none" or max_length == 0:
        return NoProposer()
    if name == "lookup":
        return PromptLookup(max_length)
    if name == "lookup-tree":
        return TreeLookup(max_length)
    if name in HEADS:
        head = feature_head.load(drafter or DEFAULT_DRAFTER, target.model)
        kind = FeatureDraft if name == FeatureDraft.name else FeatureChain
        return kind(head, max_num_running, max_model_len, max_length)
    if draft_model is not None:
        model = models.load(
            draft_model,
            device=str(target.model.device),
            dtype=str(target.model.dtype).removeprefix("torch."),
            drop_layers=draft_drop_layers,
        ).model
    elif draft_drop_layers:
        model = models.without_layers(target.model, draft_drop_layers)
    else:
        raise ValueError(f"proposer {name} needs a draft model, or layers to drop from the target")
    target_size = target.model.config.get_text_config().vocab_size
    if model.config.get_text_config().vocab_size != target_size:
        raise ValueError("the draft model must have the target's vocabulary")
    runner = ModelRunner(model, max_num_running, max_model_len)
    return (TreeDraftModel if name == "draft-tree" else DraftModel)(runner, max_length)


def link_to(endpoint: str, engine: str, keys: EngineKeys | None = None) -> LinkFactory:
    """Makes links to the daemon at ``endpoint`` for an engine of this name."""

    def connect(facts: Ready) -> EngineLink:
        fingerprint = Fingerprint(
            target=facts.model,
            proposer=facts.proposer,
            draft=facts.draft_model,
            engine="reference",
            engine_version=facts.engine_version,
            accelerator=facts.device,
            dtype=facts.dtype,
        )
        limits = Limits(
            max_length=facts.max_length,
            max_num_running=facts.max_num_running,
            static_length=facts.own_length,
            features=facts.features,
            drafts_known_first=facts.proposer in KNOWN_FIRST,
            trees=facts.proposer in TREES,
            confidences=facts.proposer in CONFIDENT,
        )
        # The epoch is the one place where the time of day is right: it must differ after a reboot.
        epoch = time.time_ns()
        return EngineLink(
            endpoint,
            Hello(engine=engine, epoch=epoch, fingerprint=fingerprint, limits=limits),
            keys=keys,
        )

    return connect


def run_worker(
    *,
    model: str | None = None,
    proposer: ProposerName = "lookup",
    draft_model: str | None = None,
    draft_drop_layers: Sequence[int] = (),
    drafter: Path | None = None,
    max_length: int = 8,
    speculation: Mode = "own",
    length: int = 3,
    engine: str = "worker-0",
    endpoint: str | None = None,
    keys: EngineKeys | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    max_num_running: int = 16,
    max_model_len: int = 1024,
    max_prefill_tokens: int = 256,
    seed: int | None = None,
    step_events: bool = False,
    fetch_only: bool = False,
    source: BinaryIO | None = None,
    sink: BinaryIO | None = None,
) -> int:
    """Load a model and serve JSON lines on standard input and output. Returns the exit status.

    Parameters
    ----------
    speculation : mode to start in
    length : the worker's own length: static, and where no daemon steers
    engine, endpoint : name on the daemon, and where it listens; None: there is no daemon
    keys : for a daemon that listens at tcp://
    threads : of torch on the CPU
    fetch_only : fetch and convert the default model, and return
    source, sink : in place of standard input and output

    The others are those of `models.load`, `make_proposer` and `Worker`.
    """
    try:
        if fetch_only:
            models.load(model)
            return 0
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = models.load(model, device=device, dtype=dtype)
        guesser = make_proposer(
            proposer,
            max_length,
            loaded,
            draft_model=draft_model,
            draft_drop_layers=draft_drop_layers,
            drafter=drafter,
            max_num_running=max_num_running,
            max_model_len=max_model_len,
        )
        worker = Worker(
            loaded.model,
            loaded.tokenizer,
            guesser,
            max_num_running=max_num_running,
            max_model_len=max_model_len,
            max_prefill_tokens=max_prefill_tokens,
            eos_token_ids=loaded.eos_token_ids,
            seed=seed,
        )
        draft = ""
        if proposer in ("draft", "draft-tree"):
            dropped = ",".join(map(str, draft_drop_layers))
            draft = (draft_model or loaded.name) + (f" without layers {dropped}" if dropped else "")
        elif proposer in HEADS:
            draft = (drafter or DEFAULT_DRAFTER).stem
        facts = Ready(
            model=loaded.name,
            draft_model=draft,
            proposer=guesser.name,
            features=worker.features,
            max_length=guesser.max_length,
            own_length=min(length, guesser.max_length),
            max_num_running=max_num_running,
            max_model_len=max_model_len,
            device=_device_name(loaded.model.device),
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            engine_version=version("smartspec"),
            tokenizer=loaded.path,
            vocabulary_size=loaded.model.config.get_text_config().vocab_size,
        )
        server = LineServer(
            worker,
            loaded.tokenizer,
            facts,
            sys.stdout.buffer if sink is None else sink,
            None if endpoint is None else link_to(endpoint, engine, keys),
            step_events,
        )
        server.switch(speculation, length if speculation == "static" else None)
    except (models.ModelNotAvailable, OSError, RuntimeError, ValueError) as error:
        print(f"smartspec worker: {error}", file=sys.stderr)
        return 2
    server.run(sys.stdin.buffer if source is None else source)
    return 0


def _device_name(device: torch.device) -> str:
    """What a cost model belongs to: the accelerator's name, not its number."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
