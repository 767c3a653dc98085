"""The programs that users run, lowered for devices that need not be there."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from fusedkv_jax import costs
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.costs.visible import visible_to_all
from fusedkv_jax.generation.programs import GenerationPrograms
from fusedkv_jax.mesh import MeshError
from fusedkv_jax.model.sharded_attention import head_axes
from fusedkv_jax.training import ExperimentConfig
from fusedkv_jax.training.program import TrainProgram
from fusedkv_jax.validation import check_count


@dataclasses.dataclass(frozen=True)
class Program:
    """A lowered program, and what is known about it without compiling.

    Attributes:
      name: "train", "prefill" or "decode".
      lowered: what `compile()` takes.
      mesh: its devices.
      tokens: that one run of it processes.
      parts: bytes of its arguments on one device, by what they are.
      model_flops: FLOPs of one run on all devices, by `fusedkv_jax.costs`.
      visible: fraction of query-key pairs that attention computes.
      remedies: what would make it smaller.
      cache_reads: bytes of cache that decoding reads on one device.
    """

    name: str
    lowered: Any
    mesh: Mesh
    tokens: int
    parts: dict[str, float]
    model_flops: float
    visible: float
    remedies: str
    cache_reads: float = 0.0


def train(config: ExperimentConfig, mesh: Mesh) -> Program:
    """The training step of an experiment.

    Raises:
      MeshError: the batch does not divide over the mesh.
    """
    program = TrainProgram(config, mesh)
    with jax.set_mesh(mesh):
        lowered = program.lower()
    tokens = config.data.batch_size * config.data.seq_len
    state = program.state
    return Program(
        "train",
        lowered,
        mesh,
        tokens,
        {"parameters": local_bytes(state.params), "optimizer": local_bytes(state.opt_state)},
        tokens * costs.train_flops_per_token(config.model, config.data.seq_len),
        _visible(config.model, config.data.seq_len, config.model.num_layers),
        _remedies(config, mesh),
    )


def prefill(config: ModelConfig, mesh: Mesh, rows: int, length: int) -> Program:
    """Reading prompts of `length` tokens each into an empty cache.

    Raises:
      MeshError: rows or length below 1, or they do not divide over the mesh.
    """
    _check_counts(rows, length)
    _check_divides(mesh, rows, length)
    programs = GenerationPrograms.abstract(config, mesh)
    return Program(
        "prefill",
        programs.lower_prefill(rows, length),
        mesh,
        rows * length,
        _inference_bytes(programs, rows, length),
        rows * costs.prefill_flops(config, length),
        _visible(config, length, config.kv_layout.prefill_depth),
        _SMALLER,
    )


def decode(config: ModelConfig, mesh: Mesh, rows: int, length: int) -> Program:
    """The decoding loop, of which one turn adds a token to each row, with full caches.

    Raises:
      MeshError: rows or length below 1.
    """
    _check_counts(rows, length)
    programs = GenerationPrograms.abstract(config, mesh)
    share = _read_share(config, mesh, programs.cache_shapes(rows, length))
    reads = rows * costs.decode_cache_reads(config, length, config.dtype) * share
    return Program(
        "decode",
        programs.lower_decode(rows, length),
        mesh,
        rows,
        _inference_bytes(programs, rows, length),
        rows * costs.decode_flops(config, length),
        1.0,
        _SMALLER,
        reads,
    )


def _check_counts(rows: int, length: int) -> None:
    check_count("rows", rows, MeshError)
    check_count("length", length, MeshError)


def _check_divides(mesh: Mesh, rows: int, length: int) -> None:
    """Tokens are split over the mesh whole; caches and the state of decoding need not be."""
    places = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % places:
        raise MeshError(
            f"rows={rows} do not divide over data={mesh.shape['data']} x "
            f"fsdp={mesh.shape['fsdp']}; use a multiple of {places}"
        )
    if length % mesh.shape["context"]:
        raise MeshError(
            f"length={length} does not divide over context={mesh.shape['context']}; use a multiple"
            " of it"
        )


def _inference_bytes(programs: GenerationPrograms, rows: int, length: int) -> dict[str, float]:
    _, params = programs.split
    cache = programs.cache_shapes(rows, length)
    return {"parameters": local_bytes(params), "cache": local_bytes(cache)}


def _read_share(config: ModelConfig, mesh: Mesh, cache: Any) -> float:
    """The part of all reads of a cache that one device makes: of what it holds.

    Rows and heads that do not divide over the mesh are whole on every device, and read there; of KV
    heads that several devices share each cuts out the one that its query heads need.
    """
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    share = local_bytes(cache) / whole
    if config.mla is None:
        heads, kv_heads = head_axes(config.num_heads, config.kv_heads, mesh.shape["tensor"])
        if heads is not None and kv_heads is None:
            share /= config.kv_heads
    return share


def local_bytes(tree: Any) -> float:
    """Bytes of abstract arrays on one device, without the padding of tiles."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


_SMALLER = "use fewer rows or tokens, split the model over more devices, or take a larger slice"


def _remedies(config: ExperimentConfig, mesh: Mesh) -> str:
    """Settings that need less memory, most effective first."""
    places = mesh.shape["data"] * mesh.shape["fsdp"]
    rows, parts = config.data.batch_size // places, config.train.grad_accumulation
    found = []
    if parts < rows:
        found.append(f"set train.grad_accumulation={rows}")
    if config.model.remat != "full":
        found.append("set model.remat=full")
    if mesh.shape["data"] > 1:
        found.append(f"set mesh.data=1 and mesh.fsdp={places}")
    return ", ".join([*found, "split over more devices (mesh.tensor, a larger slice)"])


def _visible(config: ModelConfig, length: int, layers: int) -> float:
    """The mean over the lowest `layers`, which are those that run."""
    pairs = sum(visible_to_all(config.kv_layout, i, length) for i in range(layers))
    return pairs / (layers * length**2)
