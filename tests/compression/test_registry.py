"""Compressors by name, and values that are refused."""

import dataclasses

import pytest

from fusedkv_jax import compression
from fusedkv_jax.compression import H2O, CompressionError, MiniCache, SnapKV, StreamingLLM, parse


def test_specs_give_the_compressors_that_they_name():
    assert parse("snapkv") == SnapKV()
    assert parse("snapkv:budget=64, window=8,pooling=average") == SnapKV(
        budget=64, window=8, pooling="average"
    )
    assert parse("minicache:budget=0.1,per_head=true") == MiniCache(budget=0.1, per_head=True)
    assert parse("h2o:budget=8,recent=none") == H2O(budget=8, recent=4)
    assert parse("streaming_llm:reindex=false") == StreamingLLM(reindex=False)
    for name in compression.names():
        built = parse(name)
        assert hash(built) == hash(dataclasses.replace(built))
        assert "budget" in {field.name for field in dataclasses.fields(built)}


@pytest.mark.parametrize(
    "spec, message",
    [
        ("snapvk", "did you mean snapkv"),
        ("", "unknown compressor ''"),
        ("snapkv:bugdet=3", "did you mean budget"),
        ("snapkv:budget", "name:field=value"),
        ("snapkv:budget=0", "budget=0"),
        ("snapkv:budget=1.5", "budget=1.5"),
        ("snapkv:budget=many", "budget='many'"),
        ("snapkv:pooling=median", "pooling='median'; choose max, average"),
        ("pyramidkv:beta=0", "beta=0"),
        ("streaming_llm:budget=4", "leaves no window beside sinks=4"),
        ("streaming_llm:reindex=no", "StreamingLLM: reindex='no'; use True or False"),
        ("h2o:budget=4,recent=4", "recent=4 leaves nothing to evict"),
        ("double_sparsity:channels=3", "has no 'channels'"),
    ],
)
def test_mistakes_are_one_clear_line(spec, message, without_type_checks):
    with pytest.raises(CompressionError) as error:
        parse(spec)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", compression.names())
@pytest.mark.parametrize("budget", [0, -3])
def test_budgets_below_one_are_refused(name, budget, without_type_checks):
    with pytest.raises(CompressionError, match=f"budget={budget}"):
        parse(f"{name}:budget={budget}")


def test_a_compressor_without_a_title_goes_by_its_class():
    class Mine(compression.SnapKV):
        """Messages name it."""

    assert (Mine.title, compression.SnapKV.title) == ("Mine", "SnapKV")
