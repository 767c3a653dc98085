"""The model that a program runs: a training run's, a Hugging Face folder's, or a GGUF file's.

`--workdir` names a training run, `--model` a folder or a file of somebody else's model.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import pathlib
import tempfile
from typing import TYPE_CHECKING

from absl import flags

import fusedkv_jax as fkv
from experiments.common import cli
from fusedkv_jax import interop, training
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.data import DataConfig, tokenizers
from fusedkv_jax.layouts import KINDS, KVLayout
from fusedkv_jax.training import ExperimentConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jaxtyping import Array

FLAGS = flags.FLAGS

# What training may change of a model that it starts from.
_CHANGEABLE = (
    "layout",
    "max_length",
    "dtype",
    "param_dtype",
    "remat",
    "scan_layers",
    "attention",
)
_SEQ_LEN, _BATCH_SIZE = 1024, 8  # where a model has no run that says
_temporary = contextlib.ExitStack()
atexit.register(_temporary.close)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and what belongs to it.

    Attributes:
      model: the model.
      config: that of its run; of another's model, the model's own with default data settings.
      step: of the checkpoint; None for another's model.
      where: the work directory, folder or file.
    """

    model: fkv.Decoder
    config: ExperimentConfig
    step: int | None
    where: str

    @property
    def title(self) -> str:
        """Name and step, for output."""
        return self.config.name + ("" if self.step is None else f" at step {self.step}")


def define_flags(workdir: str = "Directory of a training run.") -> None:
    """Define --workdir, --step, --model and --tokenizer."""
    flags.DEFINE_string("workdir", None, workdir)
    flags.DEFINE_integer("step", None, "Checkpoint to use; default the newest.", lower_bound=1)
    flags.DEFINE_string(
        "model", None, "Instead of --workdir: a Hugging Face folder, or a .gguf file."
    )
    flags.DEFINE_string(
        "tokenizer", None, "tokenizer.json of --model, or its folder; default the model's own."
    )
    cli.only_with("step", workdir=True)
    cli.only_with("tokenizer", model=True)


def load(mesh: Mesh | None = None, source: str | None = None, layout: str | None = None) -> Loaded:
    """The model of the command line.

    Args:
      mesh: where the parameters go, split over it; None for the default device.
      source: text to evaluate on instead of the run's held-out text: all of it, or of shards
        their held-out split. A model without a run needs it wherever text is read.
      layout: layout of --model; default the original's.

    Raises:
      ValueError: neither or both of --workdir and --model, and what loading raises.
    """
    workdir, model = named()
    if model:
        loaded = load_pretrained(model, layout, tokenizer=FLAGS.tokenizer)
        if mesh is not None:
            loaded = dataclasses.replace(loaded, model=_placed(loaded.model, mesh))
    else:
        loaded = load_run(workdir, FLAGS.step, mesh)
    if source is None:
        return loaded
    data = dataclasses.replace(loaded.config.data, source=source, holdout_fraction=1.0)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, data=data))


def named() -> tuple[str, str]:
    """--workdir and --model, one of them empty.

    Raises:
      ValueError: neither or both are given.
    """
    workdir, model = FLAGS.workdir or "", FLAGS.model or ""
    if bool(workdir) == bool(model):
        what = "both given; name one" if workdir else "missing; name a run, or give --model"
        raise ValueError(f"--workdir and --model are {what}" if workdir else f"--workdir is {what}")
    return workdir, model


def load_run(workdir: str, step: int | None = None, mesh: Mesh | None = None) -> Loaded:
    """The model of a work directory; raises as `fusedkv_jax.training.load_model`."""
    return Loaded(*training.load_model(workdir, step, mesh), workdir)


def with_tokenizer(loaded: Loaded, tokenizer: str) -> Loaded:
    """The same with its tokenizer elsewhere."""
    data = dataclasses.replace(loaded.config.data, tokenizer=tokenizer)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, data=data))


def with_text(loaded: Loaded) -> Loaded:
    """The same, known to have text to evaluate on, and a tokenizer whose ids the model has.

    Raises:
      ValueError: it has none.
    """
    if loaded.step is None and loaded.config.data.holdout_fraction < 1:
        raise ValueError(f"--source is missing; {loaded.where} has no held-out text of its own")
    # A program would take an id that is too large for the last one, and give a loss.
    tokenizer = tokenizers.load(loaded.config.data.tokenizer)
    tokenizers.check_vocab_size(tokenizer, loaded.config.model.vocab_size)
    return loaded


def load_pretrained(
    path: str,
    layout: KVLayout | str | None = None,
    *,
    tokenizer: str | None = None,
    tokenizer_folder: pathlib.Path | None = None,
) -> Loaded:
    """The model of a Hugging Face folder, or of a GGUF file.

    Args:
      path: the folder or file.
      layout: layout of our model; by default the original's.
      tokenizer: path of its tokenizer; by default what is in the folder or the file.
      tokenizer_folder: where a GGUF file's tokenizer is written; by default a folder that is
        removed when the program ends.

    Raises:
      ValueError: it cannot be read, or is of an architecture that is not supported.
    """
    place = pathlib.Path(path).expanduser()
    if place.suffix == ".gguf":
        model = interop.load_gguf(place, layout)
    else:
        model = interop.load_huggingface(place, layout=layout)
    name = tokenizer or _own_tokenizer(place, tokenizer_folder)
    return Loaded(model, experiment(place.stem, model.config, name), None, path)


def pretrained_config(path: str) -> ModelConfig:
    """The configuration alone, without reading weights; raises as `load_pretrained`."""
    place = pathlib.Path(path).expanduser()
    if place.suffix == ".gguf":
        return interop.gguf_config(place)
    return interop.folder_config(place)


class Start:
    """A model that training starts from.

    Args:
      path: of a training run, a Hugging Face folder, or a GGUF file.
      folder: where a GGUF file's tokenizer is kept.

    Attributes:
      config: the model's configuration.
      tokenizer: path of its tokenizer, or "byte".
    """

    def __init__(self, path: str, folder: pathlib.Path) -> None:
        self.path = path
        if is_run(path):
            found = run_config(path)
            self.config, self.tokenizer = found.model, found.data.tokenizer
        else:
            self.config = pretrained_config(path)
            self.tokenizer = _own_tokenizer(pathlib.Path(path).expanduser(), folder)

    def change(self, config: ExperimentConfig) -> ExperimentConfig:
        """An experiment with this model, its tokenizer, and sequences that fit its context."""
        length = min(config.data.seq_len, self.config.max_length)
        data = dataclasses.replace(config.data, tokenizer=self.tokenizer, seq_len=length)
        return dataclasses.replace(config, model=self.config, data=data)

    def settle(self, config: ExperimentConfig) -> ExperimentConfig:
        """An experiment whose layers keep the model's attention windows under another layout.

        Raises:
          ValueError: a field of the model was changed that its weights do not allow.
        """
        for field in dataclasses.fields(ModelConfig):
            mine, asked = (getattr(each, field.name) for each in (self.config, config.model))
            if field.name not in _CHANGEABLE and mine != asked:
                raise ValueError(
                    f"--config.model.{field.name}={asked} does not fit {self.path}, where it is "
                    f"{mine}; leave it out"
                )
        layers = self.config.kv_layout.layers
        streams = [layer.stream(kind) for layer in layers for kind in KINDS]
        shares = any(stream.sources or not stream.own for stream in streams)
        layout = interop.with_layout(self.config, config.model.kv_layout).kv_layout
        if shares and layout != self.config.kv_layout:
            raise ValueError(
                f"--config.model.layout: {self.path} shares keys and values across layers already; "
                "leave the layout out, or start from the model that it was made from"
            )
        return dataclasses.replace(config, model=config.model.replace(layout=layout))

    def load(self, config: ModelConfig, tokens: Array | None = None) -> fkv.Decoder:
        """The model, under the layout that is trained; raises as loading does.

        Args:
          config: of the model that is trained.
          tokens: [B, T], to fit another layout on; without them, what it has no place for is left
            out.
        """
        from fusedkv_jax.interop import uptrain  # imports JAX, for which --help does not wait

        if tokens is not None:
            return uptrain.fit(self.original(), config.kv_layout, tokens)
        if config.kv_layout == self.config.kv_layout:
            return self.original()
        if is_run(self.path):
            return uptrain.drop(self.original(), config.kv_layout)
        return load_pretrained(self.path, config.kv_layout, tokenizer=self.tokenizer).model

    def original(self) -> fkv.Decoder:
        """The model under its own layout."""
        if is_run(self.path):
            return load_run(self.path).model
        return load_pretrained(self.path, tokenizer=self.tokenizer).model


def is_run(path: str) -> bool:
    """Whether it is the work directory of a training run."""
    return training.checkpoint_directory(path).is_dir()


def run_config(path: str) -> ExperimentConfig:
    """The configuration of a training run, as `load_run` gives it, without reading weights.

    Raises:
      ValueError: there is no checkpoint, or the run's copy of its tokenizer is damaged.
    """
    from fusedkv_jax.training.checkpointing import manifest
    from fusedkv_jax.training.checkpointing.tokenizer_files import kept_tokenizer

    directory = training.checkpoint_directory(path)
    steps = training.committed_steps(directory)
    if not steps:
        raise ValueError(f"there is no checkpoint in {path}; train there first")
    config = ExperimentConfig.from_dict(manifest.read(directory / str(steps[-1])).config)
    data = dataclasses.replace(config.data, tokenizer=kept_tokenizer(config.data.tokenizer, path))
    return dataclasses.replace(config, data=data)


def experiment(name: str, model: ModelConfig, tokenizer: str) -> ExperimentConfig:
    """An experiment of a model that was not trained here, with default data settings."""
    length = min(_SEQ_LEN, model.max_length)
    data = DataConfig(tokenizer=tokenizer, seq_len=length, batch_size=_BATCH_SIZE)
    return ExperimentConfig(name=name, model=model, data=data)


def _own_tokenizer(place: pathlib.Path, folder: pathlib.Path | None) -> str:
    if place.suffix != ".gguf":
        return str(place)
    if folder is None:
        folder = pathlib.Path(_temporary.enter_context(tempfile.TemporaryDirectory()))
    interop.save_gguf_tokenizer(place, folder)
    return str(folder)


def _placed(model: fkv.Decoder, mesh: Mesh) -> fkv.Decoder:
    import jax
    from flax import nnx

    from fusedkv_jax.sharding import serving_shardings

    graphdef, params = nnx.split(model, nnx.Param)
    return nnx.merge(graphdef, jax.device_put(params, serving_shardings(params, mesh)))


def training_tokens(config: DataConfig, count: int) -> Array:
    """Whole sequences of the training text, at least so many tokens, [B, T] int32.

    Each of several processes has all of them.
    """
    import grain
    import jax.numpy as jnp
    import numpy as np

    from fusedkv_jax import data

    everything = grain.sharding.ShardOptions(shard_index=0, shard_count=1)
    batches = data.make_train_iterator(config, shard=everything)
    rows = -(-count // config.seq_len)
    found: list[np.ndarray] = []
    while len(found) < rows:
        found.extend(next(batches)["tokens"])
    return jnp.asarray(np.stack(found[:rows]), jnp.int32)
