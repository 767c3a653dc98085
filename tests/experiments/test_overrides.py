"""Overrides of frozen configurations from text."""

import dataclasses
from typing import Literal

import pytest

from experiments.common.overrides import apply_overrides
from fusedkv_jax import presets
from fusedkv_jax.data import DataConfig
from fusedkv_jax.training import ExperimentConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    size: int
    kind: Literal["small", "large"] = "small"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root:
    flag: bool = False
    rate: float = 0.5
    name: str = "a"
    limit: int | None = 3
    pair: tuple[int, ...] = (1, 2)
    leaf: Leaf = Leaf(size=1)
    maybe: Leaf | None = None


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("flag=true", Root(flag=True)),
        ("flag=0", Root(flag=False)),
        ("rate=1e-3", Root(rate=1e-3)),
        ("name=b=c", Root(name="b=c")),
        ("name=7", Root(name="7")),
        ("limit=none", Root(limit=None)),
        ("limit=1e5", Root(limit=100_000)),
        ("pair=(3, 4, 5)", Root(pair=(3, 4, 5))),
        ("leaf.size=4", Root(leaf=Leaf(size=4))),
        ("leaf.kind=large", Root(leaf=Leaf(size=1, kind="large"))),
        ("maybe.size=2", Root(maybe=Leaf(size=2))),
    ],
)
def test_values_are_read_by_the_type_of_the_field(override, wanted):
    found = apply_overrides(Root(), [override])
    assert found == wanted
    assert repr(found) == repr(wanted)  # 1 == True, but not here


def test_overrides_of_one_part_combine():
    found = apply_overrides(Root(), ["rate=2", "leaf.kind=large", "leaf.size=5"])
    assert found == Root(rate=2.0, leaf=Leaf(size=5, kind="large"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("leaf.sise=2", r"unknown field --config.leaf.sise; did you mean --config.leaf.size"),
        ("size=2", r"did you mean --config.leaf.size or --config.maybe.size"),
        ("rate.x=2", "unknown field --config.rate.x"),
        ("flag=perhaps", "--config.flag=perhaps is not of type bool"),
        ("limit=1.5", "--config.limit=1.5 is not of type int"),
        ("rate=fast", "--config.rate=fast is not of type float"),
        ("rate=nan", "--config.rate=nan is not of type float"),
        ("rate=-inf", "--config.rate=-inf is not of type float"),
        ("limit=1e999", "--config.limit=1e999 is not of type int"),
        ("pair=" + "(" * 5000, "is not of type tuple"),
        ("leaf.kind=larg", "choose small, large; did you mean large"),
        ("leaf=2", "cannot be set whole; set its fields --config.leaf.size"),
        ("maybe.kind=large", "maybe also needs size"),
        ("rate", "write --config.rate=VALUE"),
    ],
)
def test_mistakes_are_explained(override, message):
    with pytest.raises(ValueError, match=message) as caught:
        apply_overrides(Root(), [override])
    assert "\n" not in str(caught.value)


@pytest.fixture
def experiment():
    return ExperimentConfig(
        name="x", model=presets.get("demo"), data=DataConfig(seq_len=64, batch_size=4)
    )


def test_a_field_is_set_once():
    with pytest.raises(ValueError, match="--config.leaf.size is given twice"):
        apply_overrides(Root(), ["leaf.size=2", "rate=2", "leaf.size=2"])


def test_layout_follows_the_number_of_layers(experiment):
    for overrides in (
        ["model.num_layers=12", "model.layout=fusedkv_lite"],
        ["model.layout=fusedkv_lite", "model.num_layers=12"],
    ):
        found = apply_overrides(experiment, overrides).model
        assert found == presets.get("demo", layout="fusedkv_lite", num_layers=12)
    found = apply_overrides(experiment, ["model.num_layers=12"]).model
    assert found == presets.get("demo", num_layers=12)
    assert found.kv_layout.prefill_depth == 6


def test_derived_head_size_follows_the_width(experiment):
    found = apply_overrides(experiment, ["model.d_model=384", "model.rope.theta=5e5"]).model
    assert (found.head_dim, found.rope.theta) == (384 // experiment.model.num_heads, 5e5)


def test_values_are_validated_by_the_configuration(experiment):
    with pytest.raises(ValueError, match="train.steps=0; use a whole number from 1"):
        apply_overrides(experiment, ["train.steps=0"])
