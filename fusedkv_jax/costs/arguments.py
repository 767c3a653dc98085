"""What the costs are asked about: a configuration, and counts that there can be."""

from __future__ import annotations

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.validation import check_count, check_kind


def check(config: object, **counts: object) -> None:
    """Raises ValueError unless it is a configuration and the counts are 1 or more."""
    check_kind("config", config, ModelConfig, "a ModelConfig, such as presets.get('332m')")
    for name, value in counts.items():
        check_count(name, value)
