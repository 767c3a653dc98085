"""The configuration of a training run: model, data, optimizer and loop in one frozen tree."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.data import DataConfig
from fusedkv_jax.mesh import MeshConfig
from fusedkv_jax.training.early_exit_config import EarlyExitConfig
from fusedkv_jax.training.optimizer_config import OptimizerConfig
from fusedkv_jax.validation import validate

LOGITS_MIB = 512  # of float32 logits at a time
GradientType = Literal["float32", "bfloat16"]
Trainable = Literal["all", "changed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What the training loop does and when.

    Attributes:
      steps: batches of the whole run.
      grad_accumulation: microbatches that a batch is computed in; the result is that of one big
        batch, the activations are those of a small one.
      gradient_dtype: "float32"; or "bfloat16", which differentiates a bfloat16 copy of the
        matrices: gathered weights and reduced gradients are half as large. Sums over
        microbatches, the optimizer's state and the parameters themselves stay as they are.
      trainable: "all" parameters; or "changed", for a model that was converted to its layout:
        stream weights, and layers that read other layers' keys or values. The others keep their
        values and have no gradients and no optimizer state.
      logits_mib: MiB of float32 logits that a device holds at a time; larger batches compute the
        loss in chunks. Each chunk reads and writes the gradient of the output head once, so more is
        faster where there is memory.
      seed: of the initial parameters.
      log_every: steps between metric lines.
      eval_every: steps between evaluations on held-out text; 0 means only at the end.
      eval_batches: batches of one evaluation; 0 turns evaluation off.
      checkpoint_every: steps between checkpoints; 0 means by time and at the end only.
      checkpoint_minutes: minutes between checkpoints, whatever the steps; 0 means by steps and at
        the end only.
      keep_checkpoints: the newest checkpoints that are kept.
      keep_best: checkpoints kept besides, those with the lowest held-out loss; evaluate at the
        steps that are saved.
      peak_flops: peak FLOP/s of the machine, for the model FLOPs utilisation; None looks the
        device up and leaves the figure out where it is unknown.
    """

    steps: int = 1000
    grad_accumulation: int = 1
    gradient_dtype: GradientType = "float32"
    trainable: Trainable = "all"
    logits_mib: int = LOGITS_MIB
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 16
    checkpoint_every: int = 0
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 3
    keep_best: int = 0
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "grad_accumulation", "logits_mib", "log_every", "keep_checkpoints"):
            _check_integer(name, getattr(self, name), 1)
        for name in ("seed", "eval_every", "eval_batches", "checkpoint_every", "keep_best"):
            _check_integer(name, getattr(self, name), 0)
        for name, kind in (("gradient_dtype", GradientType), ("trainable", Trainable)):
            if getattr(self, name) not in get_args(kind):
                known = " or ".join(get_args(kind))
                raise ValueError(f"train.{name}={getattr(self, name)!r}; choose {known}")
        validate(self, ValueError, prefix="train.")
        if self.checkpoint_minutes < 0:
            raise ValueError(
                f"train.checkpoint_minutes={self.checkpoint_minutes} must be 0 or more minutes"
            )
        if self.peak_flops is not None and self.peak_flops <= 0:
            raise ValueError(f"train.peak_flops={self.peak_flops} must be positive, or none")


def _check_integer(name: str, value: Any, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value < 2**31:
        raise ValueError(f"train.{name}={value!r} must be a whole number from {least} to 2**31 - 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One experiment: everything that a run depends on.

    Attributes:
      name: what the run is called in its output.
      model, data, optimizer, train, mesh, early_exit: the parts; see their classes.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    early_exit: EarlyExitConfig = EarlyExitConfig()

    def __post_init__(self) -> None:
        validate(self, ValueError)
        if not self.name:
            raise ValueError("name='' is empty; say what the run is called")
        if self.data.batch_size % self.train.grad_accumulation:
            raise ValueError(
                f"train.grad_accumulation={self.train.grad_accumulation} must divide "
                f"data.batch_size={self.data.batch_size}"
            )
        if self.data.seq_len > self.model.max_length:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} is longer than model.max_length="
                f"{self.model.max_length}; raise model.max_length or lower data.seq_len"
            )

    def to_dict(self) -> dict[str, Any]:
        """A nested dictionary that JSON can hold; `from_dict` reverses it."""
        parts = {name: dataclasses.asdict(getattr(self, name)) for name in _PARTS}
        return {"name": self.name, "model": self.model.to_dict(), **parts}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ExperimentConfig":
        """Build and validate the configuration that `to_dict` described.

        Raises:
          ValueError: an unknown field or a value that is not allowed.
        """
        parts = {} if not isinstance(values, Mapping) else dict(values)
        for name in ("name", "model", "data"):
            if name not in parts:
                raise ValueError(f"the experiment has no {name}; to_dict() gives all of it")
        check_fields(cls, parts, "the experiment")
        parts["model"] = ModelConfig.from_dict(parts["model"])
        for name, kind in _PARTS.items():
            fields = parts.get(name, {})
            if not isinstance(fields, Mapping):
                raise ValueError(f"{name}={fields!r}; use fields by name")
            check_fields(kind, fields, name)
            parts[name] = kind(**fields)
        return cls(**parts)


_PARTS = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "mesh": MeshConfig,
    "early_exit": EarlyExitConfig,
}


def check_fields(kind: type, names: Iterable[str], where: str) -> None:
    """Raise ValueError, with the nearest names, unless all names are fields of `kind`."""
    known = [field.name for field in dataclasses.fields(kind)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or known
            raise ValueError(f"{where} has no field {name!r}; did you mean {' or '.join(near)}?")


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """Where two plain trees differ first, as "path: old -> new", or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    return None if old == new else f"{path}: {old!r} -> {new!r}"
