"""The default model, and a draft model cut from it, for vLLM."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

LAYERS_DROPPED = (10, 13, 16, 19, 22)


def model_dir() -> Path:
    """The default model's directory, which `make model` puts into the cache."""
    cache = os.environ.get("SMARTSPEC_CACHE")
    root = Path(cache) if cache else _user_cache() / "smartspec"
    found = root / "models" / "smollm2-135m-instruct"
    if not found.is_dir():
        raise FileNotFoundError(f"{found}: run `make model` first")
    return found


def draft_dir() -> Path:
    """The model without some layers: a draft model of honest, imperfect acceptance. Made once."""
    source = model_dir()
    target = source.with_name(f"{source.name}-draft")
    if target.is_dir():
        return target
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(dir=source.parent, prefix=".making-") as scratch:
        made = Path(scratch) / target.name
        shutil.copytree(source, made)
        config = json.loads((made / "config.json").read_text())
        kept = [i for i in range(config["num_hidden_layers"]) if i not in LAYERS_DROPPED]
        config["num_hidden_layers"] = len(kept)
        if config.get("layer_types"):
            config["layer_types"] = [config["layer_types"][i] for i in kept]
        (made / "config.json").write_text(json.dumps(config))
        weights = made / "model.safetensors"
        tensors = {}
        for name, tensor in load_file(weights).items():
            layer = re.search(r"\.layers\.(\d+)\.", name)
            if layer is None:
                tensors[name] = tensor
            elif int(layer[1]) in kept:
                place = f".layers.{kept.index(int(layer[1]))}."
                tensors[name.replace(layer[0], place)] = tensor
        save_file(tensors, weights, metadata={"format": "pt"})
        made.rename(target)
    return target


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
