"""Evaluation against a NumPy computation from the model's logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fusedkv_jax import data
from fusedkv_jax.processes import decisions
from fusedkv_jax.training import EvalResult, evaluate
from fusedkv_jax.training.evaluation import make_eval_step
from fusedkv_jax.training.state import abstract_model
from fusedkv_jax.training.step import BATCH_KEYS


@pytest.mark.parametrize("microbatches", [1, 2])
def test_figures_follow_from_the_logits(toy, toy_params, microbatches):
    graphdef, _ = abstract_model(toy.model)
    batches = list(data.make_eval_batches(toy.data))
    result = evaluate(make_eval_step(graphdef, microbatches), toy_params, batches)
    model = nnx.merge(graphdef, toy_params)
    total, count, num_bytes = 0.0, 0, 0
    for batch in batches:
        arrays = [jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "positions")]
        logits = np.asarray(model(*arrays), np.float64)
        normaliser = np.log(np.exp(logits).sum(-1))
        right = np.take_along_axis(logits, batch["targets"][..., None].clip(0), -1)[..., 0]
        mask = batch["loss_mask"] > 0
        total += (normaliser - right)[mask].sum()
        count += mask.sum()
        # Bytes are counted from the targets themselves: ids below 256 are bytes.
        num_bytes += (batch["targets"][mask] < 256).sum()
    assert result.num_tokens == count
    assert result.num_bytes == num_bytes
    assert result.metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result.metrics["bits_per_byte"] == pytest.approx(
        total / num_bytes / math.log(2), rel=1e-5
    )


def test_padding_rows_do_not_count(toy, toy_params):
    graphdef, _ = abstract_model(toy.model)
    step = make_eval_step(graphdef)
    whole = evaluate(step, toy_params, data.make_eval_batches(toy.data))
    # The same text in batches of another size, with another amount of padding at the end.
    settings = dataclasses.replace(toy.data, batch_size=5)
    other = evaluate(step, toy_params, data.make_eval_batches(settings))
    assert (other.num_tokens, other.num_bytes) == (whole.num_tokens, whole.num_bytes)
    assert other.loss_sum == pytest.approx(whole.loss_sum, rel=1e-6)


def test_the_bytes_of_several_processes_are_added_beyond_2_gib(toy_params, monkeypatch):
    class Store:
        """What the other one of two processes gives is what this one has given."""

        def key_value_set(self, key, value):
            self.value = value

        def blocking_key_value_get(self, key, timeout):
            return self.value

        def key_value_delete(self, key):
            pass

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(decisions.distributed.global_state, "client", Store())
    batch = dict.fromkeys(BATCH_KEYS) | {"num_bytes": np.int64(2**31)}
    result = evaluate(lambda params, batch: (1.0, 1), toy_params, [batch] * 3)
    assert result.num_bytes == 2 * 3 * 2**31


def test_no_text_is_an_error(toy_params):
    with pytest.raises(ValueError, match="held-out text is empty"):
        evaluate(lambda params, batch: (0.0, 0), toy_params, [])


def test_documents_without_text_are_an_error(toy_params):
    """An empty document still has the target EOS, which stands for no bytes."""
    batch = dict.fromkeys(BATCH_KEYS) | {"num_bytes": 0}
    with pytest.raises(ValueError, match="held-out text is empty"):
        evaluate(lambda params, batch: (5.0, 1), toy_params, [batch])


def test_perplexity_of_a_huge_loss_does_not_overflow():
    assert math.isfinite(EvalResult(1e6, 1, 1).metrics["perplexity"])
