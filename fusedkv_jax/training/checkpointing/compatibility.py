"""Whether a checkpoint belongs to a configuration; if not, the first thing that differs."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from fusedkv_jax.data import sources
from fusedkv_jax.data.tokenizers import ByteTokenizer
from fusedkv_jax.training.checkpointing.manifest import CheckpointError
from fusedkv_jax.training.checkpointing.trees import describe
from fusedkv_jax.training.config import ExperimentConfig, first_difference

# Settings that change how the model is computed but neither its parameters nor its function.
MODEL_RUNTIME_FIELDS = ("attention", "max_length", "remat", "scan_layers")
# Settings that change how fast batches come but not which, and the tokenizer's path: the run keeps
# the tokenizer itself, unless that is bytes.
DATA_RUNTIME_FIELDS = ("max_document_mib", "num_threads", "prefetch_batches", "tokenizer")


def check_tree(
    path: pathlib.Path,
    saved: Mapping[str, object],
    expected: Mapping[str, PyTree],
    config: ExperimentConfig,
) -> None:
    """Compare names, shapes and dtypes of the items with those that are expected.

    Orbax reports any difference as an "incompatible handler", and casts dtypes silently.

    Raises:
      CheckpointError: names the first array that differs, and the setting that causes it.
    """
    for item, tree in expected.items():
        wanted = describe(tree)
        found = describe(ocp.metadata(str(path), checkpointable_name=item).metadata)
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) == found.get(name):
                continue
            cause = _difference("model", saved, config)
            raise CheckpointError(
                f"checkpoint {path} is of another model: {item}/{name} is "
                f"{found.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
                + (f" ({cause})" if cause else "")
                + "; use the configuration it was trained with, or another --workdir"
            )


def check_config(path: pathlib.Path, saved: Mapping[str, object], config: ExperimentConfig) -> None:
    """Compare the settings that change what is computed, or which batches come.

    Raises:
      CheckpointError: names the first one that differs.
    """
    cause = _difference("model", saved, config) or _difference("data", saved, config)
    if not cause and config.train.lora_rank:  # the scale of changes is the model's, too
        cause = _difference("train", saved, config)
    if cause:
        raise CheckpointError(
            f"checkpoint {path} was made with another setting, {cause}; set it back, or use "
            "another --workdir"
        )


def _difference(part: str, saved: Mapping[str, object], config: ExperimentConfig) -> str | None:
    """The first setting of "model", "data" or "train" that differs and matters."""
    plain: Mapping[str, Any] = saved
    try:
        # A setting that is newer than the checkpoint had its default then.
        plain = json.loads(json.dumps(ExperimentConfig.from_dict(saved).to_dict()))
    except ValueError:
        pass  # a setting that is no more: the comparison names it
    old, new = (
        {name: value for name, value in values[part].items() if _matters(part, name)}
        for values in (plain, json.loads(json.dumps(config.to_dict())))
    )
    if part == "data":
        for values in (old, new):
            values["source"] = sources.absolute(values["source"])
        names = plain["data"].get("tokenizer"), config.data.tokenizer
        if sum(name == ByteTokenizer.name for name in names) == 1:
            old["tokenizer"], new["tokenizer"] = names
    return first_difference(old, new, part)


def _matters(part: str, name: str) -> bool:
    if part == "train":
        return name == "lora_alpha"
    return name not in (MODEL_RUNTIME_FIELDS if part == "model" else DATA_RUNTIME_FIELDS)
