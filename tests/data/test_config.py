"""DataConfig refuses each bad value with one line: the field, the value and the fix."""

import pytest

from fusedkv_jax.data import DataConfig


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, "data source must be a non-empty string, got ''"),
        (
            {"packing": "best-fit"},
            "data packing must be one of concat, best_fit, got 'best-fit'; "
            "did you mean 'best_fit'?",
        ),
        ({"errors": "ignore"}, "data errors must be one of strict, replace, got 'ignore'"),
        ({"seq_len": 0}, "data seq_len must be an integer of at least 1, got 0"),
        ({"batch_size": 2.0}, "data batch_size must be an integer of at least 1, got 2.0"),
        ({"batch_size": True}, "data batch_size must be an integer of at least 1, got True"),
        ({"num_threads": -1}, "data num_threads must be an integer from 0 to 1024, got -1"),
        ({"seed": 2**32}, "data seed must be an integer from 0 to 4294967295, got 4294967296"),
        (
            {"batch_size": 10**9},
            "data batch_size=1000000000 x seq_len=8 is 8,000,000,000 tokens a batch, of 2**31 - 1 "
            "at most; lower one of them",
        ),
        ({"max_documents": 0}, "data max_documents must be an integer of at least 1, got 0"),
        ({"holdout_fraction": 1.5}, "data holdout_fraction must be from 0 to 1, got 1.5"),
        ({"holdout_fraction": "0.1"}, "data holdout_fraction must be from 0 to 1, got '0.1'"),
    ],
)
def test_bad_values_are_one_clear_line(changes, message):
    with pytest.raises(ValueError) as error:
        DataConfig(**{"seq_len": 8, "batch_size": 2, **changes})
    assert str(error.value) == message
