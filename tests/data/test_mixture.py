"""Mixtures: shares by weight, an order that resumes, and every held-out document once."""

import itertools
import json

import numpy as np
import pytest

from fusedkv_jax.data import (
    DataConfig,
    EmptySplitError,
    load_corpus,
    make_eval_batches,
    make_train_iterator,
    sources,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources of other sizes, of one letter each; documents fill sequences of 8 exactly."""
    place = tmp_path_factory.mktemp("mixture")
    for name, count in (("a", 40), ("b", 7), ("c", 90)):
        texts = [name.upper() * 2 + f"{i:05d}" for i in range(count)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (place / f"{name}.jsonl").write_text(lines)
    return place


def config(folder, weights, **changes):
    source = ";".join(f"{folder}/{name}.jsonl,{weight}" for name, weight in weights.items())
    settings = {"seq_len": 8, "batch_size": 4, "holdout_fraction": 0.0, "num_threads": 1}
    return DataConfig(source=source, **settings | changes)


def rows(iterator, batches):
    return [row for batch in itertools.islice(iterator, batches) for row in batch["tokens"]]


def letters(rows):
    return "".join(chr(row[1]) for row in rows)


def test_each_source_has_its_share_and_goes_round_by_itself(folder):
    found = rows(make_train_iterator(config(folder, {"a": 5, "b": 2, "c": 3})), 100)
    drawn = letters(found)
    assert [drawn.count(letter) for letter in "ABC"] == [200, 80, 120]
    # Even from the first sequences on.
    assert [drawn[:40].count(letter) for letter in "ABC"] == [20, 8, 12]
    of_b = [row.tobytes() for row in found if chr(row[1]) == "B"]
    epochs = [of_b[i : i + 7] for i in range(0, 77, 7)]
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_order_resumes_and_belongs_to_seed_and_weights(folder):
    settings = config(folder, {"a": 0.7, "c": 0.3})
    iterator = make_train_iterator(settings)
    rows(iterator, 13)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = rows(iterator, 60)
    fresh = make_train_iterator(config(folder, {"a": 0.7, "c": 0.3}, num_threads=0))
    fresh.set_state(state)
    np.testing.assert_array_equal(rows(fresh, 60), expected)
    other = make_train_iterator(config(folder, {"a": 0.7, "c": 0.3}, seed=1))
    assert not np.array_equal(rows(other, 20), rows(make_train_iterator(settings), 20))
    with pytest.raises(ValueError, match="other documents than when the checkpoint was made"):
        make_train_iterator(config(folder, {"a": 0.6, "c": 0.4})).set_state(state)


def test_held_out_documents_of_all_sources_are_evaluated_once(folder):
    settings = config(folder, {"a": 9, "b": 1, "c": 1}, holdout_fraction=0.5)
    corpus = load_corpus(settings)
    alone = [
        load_corpus(
            DataConfig(source=f"{folder}/{n}.jsonl", seq_len=8, batch_size=4, holdout_fraction=0.5)
        ).heldout
        for n in "abc"
    ]
    expected = [part.read(i).tolist() for part in alone for i in range(len(part.lengths))]
    heldout = corpus.heldout
    assert [heldout.read(i).tolist() for i in range(len(heldout.lengths))] == expected
    assert heldout.read(len(alone[0].lengths), 1, 3).tolist() == [ord("B")] * 2
    batches = list(make_eval_batches(settings, corpus=corpus))
    assert sum(batch["num_bytes"] for batch in batches) == 7 * len(expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a;b", "'a' is no part of a mixture; write SOURCE,WEIGHT with a weight above 0"),
        ("a,1;b,0", "'b,0' is no part"),
        ("a,1;b,nan", "'b,nan' is no part"),
        ("a,1;", "'' is no part"),
        ("a,1;recall,1", "'recall' is made, not read, and cannot be mixed"),
    ],
)
def test_bad_mixtures(source, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(source=source, seq_len=8, batch_size=4)


def test_a_source_without_training_documents_is_named(folder):
    settings = config(folder, {"a": 1, "b": 1}, holdout_fraction=1.0)
    with pytest.raises(EmptySplitError, match=r"a.jsonl: no documents to train on, all 40 are"):
        make_train_iterator(settings)


def test_a_mixture_has_absolute_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert sources.absolute("x,0.25;/y,3") == f"{tmp_path}/x,0.25;/y,3"
