"""The configuration of a training run: model, data, optimizer and loop in one frozen tree."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.data import DataConfig
from fusedkv_jax.mesh import MeshConfig
from fusedkv_jax.training.distillation_config import DistillationConfig
from fusedkv_jax.training.early_exit_config import EarlyExitConfig
from fusedkv_jax.training.optimizer_config import OptimizerConfig
from fusedkv_jax.validation import build, validate

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
      lora_rank: of the change to each matrix of those layers (LoRA, arXiv 2106.09685). Matrices,
        norms and embeddings then keep their values; trained are the two factors of each change,
        and stream weights. Checkpoints hold the factors, and whoever loads a model gets their
        products added. 0 trains the parameters themselves.
      lora_alpha: changes are multiplied with lora_alpha / lora_rank.
      logits_mib: MiB of float32 logits that a device holds at a time; larger batches compute the
        loss in chunks. Each chunk reads and writes the gradient of the output head once. None is
        512 on accelerators, and on a CPU what its caches hold; see `loss.logits_at_a_time`.
      seed: of the initial parameters.
      log_every: steps between metric lines.
      eval_every: steps between evaluations on held-out text; 0 means only at the end.
      eval_batches: batches of one evaluation; 0 turns evaluation off.
      checkpoint_every: steps between checkpoints; 0 means by time and at the end only.
      checkpoint_minutes: minutes between checkpoints, whatever the steps; 0 means by steps and at
        the end only.
      keep_checkpoints: the newest checkpoints that are kept.
      keep_best: checkpoints kept besides, those with the lowest held-out loss; evaluate at the
        steps that are saved. Without evaluation (eval_batches=0) there are none.
      peak_flops: peak FLOP/s of the machine, for the model FLOPs utilisation; None looks the
        device up and leaves the figure out where it is unknown.
    """

    steps: int = 1000
    grad_accumulation: int = 1
    gradient_dtype: GradientType = "float32"
    trainable: Trainable = "all"
    lora_rank: int = 0
    lora_alpha: float = 16.0
    logits_mib: int | None = None
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
        validate(
            self,
            ValueError,
            least=_LEAST,
            most=_MOST,
            above={"peak_flops": 0, "lora_alpha": 0},
            prefix="train.",
        )


_LEAST = {
    "steps": 1,
    "grad_accumulation": 1,
    "lora_rank": 0,
    "logits_mib": 1,
    "seed": 0,
    "log_every": 1,
    "eval_every": 0,
    "eval_batches": 0,
    "checkpoint_every": 0,
    "checkpoint_minutes": 0,
    "keep_checkpoints": 1,
    "keep_best": 0,
}
# Steps are counted in int32 on the device.
_MOST = dict.fromkeys(_LEAST.keys() - {"checkpoint_minutes"}, 2**31 - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One experiment: everything that a run depends on.

    Attributes:
      name: what the run is called in its output.
      model, data, optimizer, train, mesh, early_exit, distillation: the parts; see their classes.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    early_exit: EarlyExitConfig = EarlyExitConfig()
    distillation: DistillationConfig = DistillationConfig()

    def __post_init__(self) -> None:
        validate(self, ValueError)
        if not self.name:
            raise ValueError("name='' is empty; say what the run is called")
        if self.data.batch_size % self.train.grad_accumulation:
            raise ValueError(
                f"train.grad_accumulation={self.train.grad_accumulation} must divide "
                f"data.batch_size={self.data.batch_size}"
            )
        early = self.early_exit.max_dropout or self.early_exit.loss_scale
        if self.distillation.is_on and early:
            raise ValueError("distillation and early_exit are two objectives; turn one of them off")
        if self.data.seq_len > self.model.max_length:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} is longer than model.max_length="
                f"{self.model.max_length}; raise model.max_length or lower data.seq_len"
            )

    def to_dict(self) -> dict[str, object]:
        """A nested dictionary that JSON can hold; `from_dict` reverses it."""
        parts = {name: dataclasses.asdict(getattr(self, name)) for name in _PARTS}
        return {"name": self.name, "model": self.model.to_dict(), **parts}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "ExperimentConfig":
        """Build and validate the configuration that `to_dict` described.

        Raises:
          ValueError: an unknown field or a value that is not allowed.
        """
        given: dict[str, Any] = dict(values) if isinstance(values, Mapping) else {}
        for name in ("name", "model", "data"):
            if name not in given:
                raise ValueError(f"the experiment has no {name}; to_dict() gives all of it")
        parts: dict[str, object] = {"model": ModelConfig.from_dict(given["model"])}
        for name, kind in _PARTS.items():
            parts[name] = build(kind, given.get(name, {}), ValueError, f"{name}.")
        return build(cls, given | parts, ValueError)


_PARTS = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "mesh": MeshConfig,
    "early_exit": EarlyExitConfig,
    "distillation": DistillationConfig,
}


def first_difference(old: object, new: object, path: str = "") -> str | None:
    """Where two plain trees differ first, as "path: old -> new", or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = enumerate(zip(old, new, strict=True))
        found = (first_difference(*pair, f"{path}.{i}") for i, pair in parts)
        return next(filter(None, found), None)
    return None if old == new else f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: object) -> str:
    """For a message of one line: a layout may be written out."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
