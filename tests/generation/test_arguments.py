"""Arguments that cannot be: errors that name the argument and the remedy."""

import dataclasses
import inspect

import pytest

import fusedkv_jax as fkv
from fusedkv_jax.generation.buckets import Buckets
from fusedkv_jax.generation.placement import Placement
from fusedkv_jax.generation.settings import EngineSettings, Settings
from tests.model import small

pytestmark = pytest.mark.usefixtures("without_type_checks")
ENTRIES = (fkv.generate, fkv.stream, fkv.beam_search, fkv.chat, fkv.warm_up)


@pytest.fixture(scope="module")
def model():
    return small.decoder(small.config("fusedkv", num_layers=4, d_model=8, d_ff=8))


def test_settings_have_one_definition():
    fields = [field.name for field in dataclasses.fields(EngineSettings)]
    assert list(Settings.__annotations__) == fields
    for entry in ENTRIES:
        shown = inspect.signature(entry).parameters
        assert set(fields) <= set(shown)
        assert not any(p.kind is p.VAR_KEYWORD for p in shown.values())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("temperature", 1, r"temperature is a sampling parameter; .*SamplingParams\(temperature=1"),
        ("beam_width", 4, r"beam_width is a sampling parameter; .*BeamSearchParams\(beam_width=4"),
        ("batchsize", 4, "unknown argument 'batchsize'; did you mean batch_size"),
        ("frobnicate", 4, "unknown argument 'frobnicate'; choose .*cache_dtype"),
    ],
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_unknown_arguments(model, entry, name, value, message):
    with pytest.raises(TypeError, match=f"^{entry.__name__}: {message}"):
        entry(model, [[1]], **{name: value})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"compression": "snapkv"}, r"compression='snapkv'; pass a compressor, such as .*SnapKV\("),
        ({"compression": fkv.compression.SnapKV}, "compression=<class .*; pass a compressor"),
        ({"speculation": 4}, r"speculation=4; pass SelfSpeculation\("),
        ({"mesh": "data"}, r"mesh='data'; pass make_mesh\("),
        ({"batch_size": "4"}, "batch_size='4'; use at least 1"),
        ({"batch_size": None}, "batch_size=None; use at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5; use at least 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0; use at least 1"),
        ({"cache_dtype": "int3"}, "int3"),
        ({"cache_dtype": 8}, "cache_dtype=8; use a name, such as 'int8'"),
        ({"bucketing": "no"}, "bucketing='no'; use True or False"),
        ({"add_special_tokens": 1}, "add_special_tokens=1; use True or False"),
        ({"prefill_parts": "half"}, "prefill_parts='half'; use equal, balanced, or sizes"),
        ({"eos_id": -1}, "eos_id=-1; use at least 0"),
        ({"eos_id": 61}, "eos_id=61; use 0 to 60"),
        ({"progress": 1}, "progress=1; pass a function"),
        ({"on_error": "ignore"}, "on_error='ignore'; use 'raise' or 'return'"),
        ({"params": {"temperature": 1}}, r"params=\{'temperature': 1\}; pass SamplingParams"),
        ({"params": [0.5]}, "params holds 0.5; pass a list of SamplingParams"),
        ({"params": fkv.BeamSearchParams()}, "params=BeamSearchParams.*; pass SamplingParams"),
        ({"tokenizer": "byte"}, "tokenizer='byte' has no encode.*tokenizers.load"),
        ({"prompts": [1, 2]}, "prompts is one list of token ids; pass a list of prompts"),
        ({"prompts": 5}, "prompts=5; pass a list"),
        ({"prompts": {"a": 1}}, "prompts=.*; pass a list"),
    ],
)
def test_arguments_of_the_wrong_kind(model, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        fkv.generate(model, **{"prompts": [[1]], **settings})
    assert "\n" not in str(error.value)


def test_whole_prompts_are_not_bounded(model):
    mha = small.decoder(small.config("mha", num_layers=2, d_model=8, d_ff=8))
    chosen = fkv.compression.PyramidInfer(budget=0.5)
    with pytest.raises(ValueError, match="max_num_batched_tokens=8 cannot bound PyramidInfer"):
        fkv.generate(mha, [[1]], compression=chosen, max_num_batched_tokens=8)


@pytest.mark.parametrize("bucketing", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 32])
def test_rows_and_their_tokens_keep_within_the_budget(window, bucketing):
    """The tokens of a step are bounded, and each row gets as many as the compressor looks at."""
    compressor = None if window is None else fkv.compression.SnapKV(window=window)
    config, needed = small.config("mha", num_layers=2), window or 1
    served = 0
    for budget in range(1, 80):
        settings = EngineSettings(
            max_num_batched_tokens=budget, bucketing=bucketing, compression=compressor
        )
        if budget < needed:
            with pytest.raises(ValueError, match=f"={budget} cannot bound SnapKV, which runs"):
                settings.check(config)
            continue
        try:
            settings.check(config)
        except ValueError:
            assert bucketing and budget < 2 * needed  # a size of arrays that no bucket has
            continue
        buckets, served = Buckets(settings, Placement()), served + 1
        rows = buckets.rows(settings.most_rows)
        assert 1 <= rows <= buckets.rows(settings.batch_size)
        assert needed <= buckets.width(rows) <= budget // rows
    assert served > 40


def test_models_and_beams_of_the_wrong_kind(model):
    with pytest.raises(ValueError, match="model is str; pass a Decoder"):
        fkv.generate("runs/demo", [[1]])
    with pytest.raises(ValueError, match="beam_search takes BeamSearchParams"):
        fkv.beam_search(model, [[1]], fkv.SamplingParams())
    with pytest.raises(ValueError, match="beam_search does not take compression"):
        fkv.beam_search(model, [[1]], compression=fkv.compression.SnapKV(budget=4))
    with pytest.raises(ValueError, match="max_length=0; use at least 2"):
        fkv.warm_up(model, max_length=0)
    with pytest.raises(ValueError, match="stream_interval='4'; use at least 1"):
        fkv.stream(model, [[1]], stream_interval="4")
