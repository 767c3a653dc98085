"""Which mesh, rematerialization and accumulation suit a slice: ranked by formula, then compiled."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from fusedkv_jax import costs
from fusedkv_jax.compile_ahead import programs, report
from fusedkv_jax.compile_ahead.chips import Slice
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.sharding import MeshConfig, MeshError, make_mesh
from fusedkv_jax.training import ExperimentConfig
from fusedkv_jax.training.loss import LOGITS_MIB
from fusedkv_jax.validation import check_count

# How much of the forward pass the backward pass repeats, and bytes that a token keeps in a layer:
# widths of D, of all heads, and of the feed-forward part, times two bytes. Counted in compiled
# steps of the 1.5B preset with MHA, 2 x 8,192 tokens a device of v5p:2x2x1: "dots" has the products
# of "none", 193.2 TFLOP, and repeats elementwise work alone, "qkv" 234.4; "none", "dots" and "qkv"
# need 66.2, 23.2 and 10.7 GB of temporaries.
_REMAT = {
    "none": (0.0, (11, 8, 7)),
    "dots": (0.02, (2, 4, 2)),
    "qkv": (0.65, (1, 3, 0)),
    "full": (1.0, (1, 0, 0)),
}
_TILE = 8  # rows of a tile: parts that are not whole tiles travel as sums, at twice the price
_EXPOSED = 0.1  # of the shorter of computation and communication: not hidden behind the other
_SLACK = 0.8  # of the memory that candidates are expected to need at most; the formula is rough


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings of a training run, and what the formula expects of them.

    Attributes:
      mesh, remat, grad_accumulation: the settings.
      memory: bytes of a device.
      seconds: of one step.
    """

    mesh: MeshConfig
    remat: str
    grad_accumulation: int
    memory: float
    seconds: float

    def apply(self, config: ExperimentConfig) -> ExperimentConfig:
        """The experiment with these settings."""
        return dataclasses.replace(
            config,
            model=config.model.replace(remat=self.remat),
            mesh=self.mesh,
            train=dataclasses.replace(config.train, grad_accumulation=self.grad_accumulation),
        )

    def __str__(self) -> str:
        mesh = " x ".join(
            f"{axis}={size}"
            for axis in ("data", "fsdp", "context", "tensor")
            if (size := getattr(self.mesh, axis)) > 1
        )
        parts = self.grad_accumulation
        plural = "" if parts == 1 else "es"
        return f"{mesh or 'one device'}, {self.remat}, {parts} microbatch{plural}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate that was compiled; `report` is None if it did not fit, and `missing` is bytes."""

    candidate: Candidate
    report: report.Report | None
    missing: int = 0


def candidates(config: ExperimentConfig, place: Slice, devices: Any) -> list[Candidate]:
    """Settings that divide the model and the batch and should fit, the fastest first.

    Of those that differ only in how large the same axes are, the first one.

    Args:
      config: the experiment, whose model, batch and length stay as they are.
      place: the slice.
      devices: its devices.

    Raises:
      ValueError: none divides them.
    """
    found = [_expect(config, place, *settings) for settings in _settings(config, place)]
    fitting = [c for c in found if c.memory <= _SLACK * place.chip.hbm]
    # Where none should fit, those that come nearest are still worth a compiler's word.
    found = sorted(fitting, key=lambda c: (c.seconds, c.memory)) or sorted(
        found, key=lambda c: c.memory
    )
    best: dict[tuple[str, int, int], Candidate] = {}
    for candidate in found:
        mesh = candidate.mesh
        kind = candidate.remat, mesh.context, mesh.tensor
        if kind not in best and _exists(mesh, devices):
            best[kind] = candidate
    if not best:
        raise ValueError(
            f"no mesh of {place.devices} devices divides data.batch_size={config.data.batch_size} "
            f"and the model's sizes; change the batch, or take a slice of another size"
        )
    return list(best.values())


def search(
    config: ExperimentConfig,
    place: Slice,
    devices: Any,
    *,
    wanted: int = 3,
    limit: int = 8,
    progress: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Compile the most promising candidates.

    Args:
      config: the experiment, whose model, batch and length stay as they are.
      place: the slice.
      devices: its devices.
      wanted: stop after so many that fit.
      limit: compile at most so many.
      progress: is told of every trial.

    Returns:
      All trials, those that fit first, by the time that their compiled programs take.

    Raises:
      ValueError: wanted or limit below 1, or no settings divide the model and the batch.
    """
    check_count("wanted", wanted)
    check_count("limit", limit)
    trials: list[Trial] = []
    for candidate in candidates(config, place, devices)[:limit]:
        trials.append(attempt(candidate, config, place, devices))
        progress(trials[-1])
        if sum(trial.report is not None for trial in trials) == wanted:
            break
    return sorted(
        trials,
        key=lambda t: (t.report is None, t.report.estimate.seconds if t.report else t.missing),
    )


def attempt(candidate: Candidate, config: ExperimentConfig, place: Slice, devices: Any) -> Trial:
    """Compile one candidate."""
    applied = candidate.apply(config)
    program = programs.train(applied, make_mesh(applied.mesh, devices))
    try:
        return Trial(candidate, report.make_report(program, place))
    except report.DoesNotFit as error:
        return Trial(candidate, None, error.missing)


def _exists(mesh: MeshConfig, devices: Any) -> bool:
    try:
        make_mesh(mesh, devices)
    except MeshError:
        return False
    return True


def _settings(config: ExperimentConfig, place: Slice) -> Iterator[tuple[dict[str, int], str, int]]:
    model, data, count = config.model, config.data, place.devices
    sizes = [n for n in range(1, count + 1) if count % n == 0 and n & (n - 1) == 0]
    for fsdp, context, tensor in itertools.product(sizes, (1, 2, 4), (1, 2, 4, 8)):
        inner = fsdp * context * tensor
        if inner > count or count % inner or not _divides(model, fsdp * context, tensor):
            continue
        rows = count // inner * fsdp  # places of the batch
        if data.batch_size % rows or data.seq_len % context:
            continue
        mesh = {"data": count // inner, "fsdp": fsdp, "context": context, "tensor": tensor}
        share = data.batch_size // rows
        for remat in _REMAT:
            for accumulation in (n for n in range(1, share + 1) if share % n == 0):
                yield mesh, remat, accumulation


def _divides(model: ModelConfig, width: int, tensor: int) -> bool:
    parts = (model.num_heads, model.kv_heads, model.d_ff, model.vocab_size)
    return model.d_model % width == 0 and all(size % tensor == 0 for size in parts)


def _expect(
    config: ExperimentConfig, place: Slice, mesh: dict[str, int], remat: str, accumulation: int
) -> Candidate:
    """Memory: the state, its gradients (and their sum), what layers keep for the backward pass,
    the widest layer's own activations, and a part of the logits. Time: weights travel while others
    are used, but what a layer's products need at once is waited for."""
    model, chip, (repeated, _) = config.model, place.chip, _REMAT[remat]
    tensor, split = mesh["tensor"], mesh["fsdp"] * mesh["context"]
    total, per_token = _costs(model, config.data.seq_len)
    rows = config.data.batch_size // (mesh["data"] * mesh["fsdp"] * accumulation)
    tokens = rows * config.data.seq_len / mesh["context"]
    heads = model.num_heads * model.channels / tensor
    fine = 2 if model.d_model // split % _TILE else 1
    # Weights in bfloat16, gathered again where the forward pass is repeated; float32 gradients.
    sent = (2 * (3 if repeated else 2) + 4) * total / tensor * fine * (split > 1)
    sent += 8 * total / (tensor * split) / accumulation * (mesh["data"] > 1)
    passes = 4 + 2 * (repeated > 0)  # sums over heads and feed-forward, in both directions
    waits = model.num_layers * passes * 4 * tokens * model.d_model * (tensor > 1)
    waits += model.num_layers * 4 * 4 * tokens * heads * (mesh["context"] - 1)
    share = config.data.batch_size * config.data.seq_len / place.devices
    compute = per_token * (1 + repeated / 3) * share / chip.flops
    hidden, waiting = (accumulation * size / chip.ici for size in (sent, waits))
    seconds = max(compute, hidden) + _EXPOSED * min(compute, hidden) + waiting
    memory = 4 * total / (split * tensor) * (4 if accumulation == 1 else 5)
    memory += 6 * model.vocab_size * model.d_model / tensor * (split > 1)
    logits = (config.train.logits_mib or LOGITS_MIB) * 2**20
    memory += 3 * logits + _activations(model, remat, tokens, tensor)
    return Candidate(_mesh(**mesh), remat, accumulation, memory, seconds)


def _activations(model: ModelConfig, remat: str, tokens: float, tensor: int) -> float:
    """Bytes of what all layers keep, and of what the backward pass of one works with."""
    widths = model.d_model, model.num_heads * model.channels / tensor, model.d_ff / tensor
    kept = sum(count * width for count, width in zip(_REMAT[remat][1], widths, strict=True))
    working = sum(count * width for count, width in zip((24, 16, 12), widths, strict=True))
    return 2 * tokens * (model.num_layers * kept + working)


@functools.lru_cache
def _costs(model: ModelConfig, length: int) -> tuple[int, float]:
    """Parameters, and FLOPs of a token."""
    return costs.parameter_count(model), costs.train_flops_per_token(model, length)


def _mesh(data: int, fsdp: int, context: int, tensor: int) -> MeshConfig:
    return MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor)
