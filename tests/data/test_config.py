"""DataConfig refuses each bad value with one line: the field, the value and the fix."""

import pytest

from fusedkv_jax.data import DataConfig


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, "data.source='' is empty; give a name"),
        ({"packing": "best-fit"}, "data.packing='best-fit'; choose concat, best_fit"),
        ({"errors": "ignore"}, "data.errors='ignore'; choose strict, replace"),
        ({"seq_len": 0}, "data.seq_len=0; use a whole number of at least 1"),
        ({"batch_size": 2.0}, "data.batch_size=2.0; use a whole number of at least 1"),
        ({"batch_size": True}, "data.batch_size=True; use a whole number of at least 1"),
        ({"num_threads": -1}, "data.num_threads=-1; use a whole number from 0 to 1024"),
        ({"seed": 2**32}, "data.seed=4294967296; use a whole number from 0 to 4294967295"),
        (
            {"batch_size": 10**9},
            "data.batch_size=1000000000 x data.seq_len=8 is 8,000,000,000 tokens a batch, of "
            "2**31 - 1 at most; lower one of them",
        ),
        ({"max_documents": 0}, "data.max_documents=0; use a whole number of at least 1 or None"),
        ({"holdout_fraction": 1.5}, "data.holdout_fraction=1.5; use a number from 0 to 1"),
        ({"holdout_fraction": "0.1"}, "data.holdout_fraction='0.1'; use a number from 0 to 1"),
    ],
)
def test_bad_values_are_one_clear_line(changes, message):
    with pytest.raises(ValueError) as error:
        DataConfig(**{"seq_len": 8, "batch_size": 2, **changes})
    assert str(error.value) == message
