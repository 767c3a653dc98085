"""The paper's runs and the programs that serve its models, as they are compiled ahead of time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments.configs import paper_332m
from fusedkv_jax import compile_ahead as ahead
from fusedkv_jax import presets
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.mesh import MeshConfig
from fusedkv_jax.training import ExperimentConfig


def paper_run(preset: str, layout: str) -> ExperimentConfig:
    """The recipe of the paper for a preset's size, spread over all devices."""
    config = paper_332m.get_config(preset)
    model = presets.get(preset, layout=layout, dtype="bfloat16", remat="full")
    return dataclasses.replace(config, model=model)


def inference(
    name: str,
    model: ModelConfig,
    devices: Sequence[Any],
    *,
    tensor: int,
    rows: int | None,
    length: int,
) -> ahead.programs.Program:
    """Prefill or decoding with bfloat16 parameters, `tensor` parts of the model."""
    from fusedkv_jax.sharding import make_mesh

    programs = ahead.programs
    mesh = make_mesh(MeshConfig(data=-1, tensor=tensor), devices)
    make = programs.prefill if name == "prefill" else programs.decode
    model = model.replace(param_dtype="bfloat16")
    return make(model, mesh, mesh.size if rows is None else rows, length)
