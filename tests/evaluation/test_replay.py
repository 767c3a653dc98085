"""Teacher-forced decoding and perplexity through a cache against the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusedkv_jax.data.recall_forms import TokenForm
from fusedkv_jax.evaluation import (
    Method,
    at_length,
    equal_shapes,
    evaluate_case,
    recall_case,
    replay,
    split,
    text_case,
    total,
)
from fusedkv_jax.evaluation.longcontext_cases import LongContextSettings
from tests.model import small


@pytest.fixture(scope="module")
def model():
    return small.decoder(small.config("fusedkv"))


@pytest.fixture(scope="module")
def texts():
    return np.random.default_rng(0).integers(0, small.VOCAB, (3, 30), np.int32)


def test_logits_are_those_of_the_full_forward(model, texts):
    parts = split(texts, np.array([20, 9, 29]))
    found = replay(model, parts)
    full = np.asarray(model(jnp.asarray(texts)))
    for row, cut in enumerate((20, 9, 29)):
        # Token i is predicted by the logits of token i - 1.
        ours = np.asarray(found.logits[row, : 30 - cut])
        assert np.allclose(ours, full[row, cut - 1 : 29], atol=1e-4)
        assert (parts.tokens[row, : 30 - cut] == texts[row, cut:]).all()
        assert (parts.prompts[row, :cut] == texts[row, :cut]).all()
    config = model.config
    streams = len(config.kv_layout.cached_keys) + len(config.kv_layout.cached_values)
    places = parts.prompts.shape[1] + parts.tokens.shape[1]
    assert found.cache_bytes == streams * 3 * places * config.kv_heads * config.channels * 4


def test_perplexity_by_position(model, texts):
    logits = jnp.asarray(np.asarray(model(jnp.asarray(texts)))[:, :-1])
    each = -np.asarray(jax.nn.log_softmax(logits))
    each = np.take_along_axis(each, texts[:, 1:, None], axis=2)[..., 0]  # [B, T]
    parts = at_length(model, texts, chunk=8)
    assert [(part.start, part.stop) for part in parts] == [(0, 8), (8, 16), (16, 24), (24, 29)]
    for part in parts:
        assert part.loss == pytest.approx(each[:, part.start : part.stop].mean(), rel=1e-4)
    whole = total(parts)
    assert whole.perplexity == pytest.approx(np.exp(each.mean()), rel=1e-4)
    mask = np.zeros((3, 29))
    mask[1, 3:6] = 1
    (part,) = at_length(model, texts, chunk=8, mask=mask)
    assert part.loss == pytest.approx(each[1, 3:6].mean(), rel=1e-4)


def test_cases_and_scores(model):
    case = recall_case("kv_recall", TokenForm(small.VOCAB), length=32, count=4)
    assert case.answers.max() == 7  # a fact is two tokens, and 0.45 * 32 of them hold facts
    assert case.parts.lengths.tolist() == [32 - 15 + 2] * 4  # up to the first key that is asked
    after = recall_case("kv_recall", TokenForm(small.VOCAB), length=32, count=4, question="after")
    assert after.parts.lengths.tolist() == [32 - 15] * 4
    methods = [Method("whole"), Method("int8", cache_dtype="int8")]
    scores = evaluate_case(model, case, methods)
    assert (scores["whole"].kl, scores["whole"].top1, scores["whole"].bytes_ratio) == (0, 1, 1)
    assert 0 < scores["int8"].kl < 0.01
    assert scores["int8"].top1 > 0.9
    # A byte instead of four for each of 8 channels, and a scale of four bytes.
    assert scores["int8"].bytes_ratio == pytest.approx((8 + 4) / 32)
    # The model is not trained: what it gets right is luck.
    right = np.asarray(replay(model, case.parts).logits.argmax(-1)) == case.parts.tokens
    assert scores["whole"].accuracy == pytest.approx(right[case.answers > 0].mean())
    # Padding to equal shapes changes no score but the bytes.
    alone = recall_case("single_needle", TokenForm(small.VOCAB), length=32, count=4)
    padded, other = equal_shapes([case, alone])
    assert padded.parts.prompts.shape == other.parts.prompts.shape == (4, 31)
    assert padded.parts.tokens.shape == other.parts.tokens.shape == (4, 13)
    wide = evaluate_case(model, padded, methods[1:])["int8"]
    assert wide.loss == pytest.approx(scores["int8"].loss, rel=1e-5)
    assert wide.kl == pytest.approx(scores["int8"].kl, rel=1e-3)
    assert (wide.accuracy, wide.top1) == (scores["int8"].accuracy, scores["int8"].top1)
    plain = text_case(case.parts.prompts[:, :17], continuation=5)
    assert evaluate_case(model, plain, methods)["whole"].accuracy is None


def test_mistakes(model, texts):
    with pytest.raises(ValueError, match="cut=30 leaves a part empty; rows have 30 tokens"):
        split(texts, np.array([30, 1, 1]))
    long = np.zeros((1, 70), np.int32)
    with pytest.raises(ValueError, match="the text has 70 tokens, more than .* max_length=64"):
        replay(model, split(long, np.array([60])))
    with pytest.raises(ValueError, match="the texts have 69 positions"):
        at_length(model, long)
    with pytest.raises(ValueError, match="mask selects no target"):
        at_length(model, texts, chunk=8, mask=np.zeros((3, 29)))
    for shape in ((29,), (1, 29), (3, 30), (3, 20)):
        with pytest.raises(ValueError, match=r"mask has shape \(.*\); use \(3, 29\)"):
            at_length(model, texts, chunk=8, mask=np.ones(shape))
    with pytest.raises(ValueError, match="count=0; use a whole number of at least 1"):
        recall_case("kv_recall", TokenForm(small.VOCAB), length=32, count=0)


@pytest.mark.usefixtures("without_type_checks")
def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="question='befor'; choose inside, after"):
        recall_case("kv_recall", TokenForm(64), length=64, count=2, question="befor")
    for field, message in (
        ({"question": "insdie"}, "question='insdie'; choose inside, after"),
        ({"examples": 0}, "examples=0; use a whole number of at least 1"),
        ({"length": -3}, "length=-3; use a whole number of at least 2"),
        ({"length": 8.5}, "length=8.5; use a whole number of at least 2"),
        ({"seed": -1}, "seed=-1; use a whole number of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LongContextSettings(**field)
