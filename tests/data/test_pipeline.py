"""The pipelines: order, exact resumption, processes, and the figures of evaluation."""

import itertools
import json

import grain
import numpy as np
import pytest
from grain.sharding import ShardOptions
from orbax.checkpoint import v1 as ocp

from fusedkv_jax.data import (
    DataConfig,
    EmptySplitError,
    load_corpus,
    make_eval_batches,
    make_train_iterator,
)

KEYS = ["loss_mask", "positions", "segment_ids", "targets", "tokens"]
NO_SHARDING = ShardOptions(shard_index=0, shard_count=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """300 documents of 1 to 60 bytes."""
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 61)))) for _ in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def config(source, **changes):
    settings = {"source": source, "seq_len": 16, "batch_size": 4, "holdout_fraction": 0.2}
    return DataConfig(**{**settings, **changes})


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def rows_of(batches):
    return [row.tobytes() for batch in batches for row in batch["tokens"]]


def test_batches_are_the_packed_sequences(source):
    batch = next(make_train_iterator(config(source)))
    assert sorted(batch) == KEYS
    assert {batch[key].shape for key in KEYS} == {(4, 16)}
    assert [batch[key].dtype.name for key in KEYS] == ["float32", *["int32"] * 4]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_each_epoch_is_every_sequence_once_in_another_order(source, packing):
    settings = config(source, packing=packing, batch_size=1)
    corpus = load_corpus(settings)
    iterator = make_train_iterator(settings, corpus=corpus)
    targets = int(corpus.train.lengths.sum())
    epochs = []
    for _ in range(3):
        epoch, seen = [], 0
        while seen < targets:
            epoch.append(next(iterator))
            seen += int(epoch[-1]["loss_mask"].sum())
        assert seen == targets
        epochs.append(rows_of(epoch))
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_is_a_function_of_the_seed_and_not_of_the_threads(source):
    batches = take(make_train_iterator(config(source, seed=5)), 60)
    assert_equal(batches, take(make_train_iterator(config(source, seed=5, num_threads=0)), 60))
    assert_equal(batches, take(make_train_iterator(config(source, seed=5, num_threads=7)), 60))
    assert rows_of(batches) != rows_of(take(make_train_iterator(config(source, seed=6)), 60))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_resuming_amid_an_epoch_gives_the_same_100_batches(source, packing, num_threads):
    settings = config(source, packing=packing, num_threads=num_threads)
    iterator = make_train_iterator(settings)
    take(iterator, 37)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 100)
    fresh = make_train_iterator(settings)
    fresh.set_state(state)
    assert_equal(take(fresh, 100), expected)
    iterator.set_state(state)
    assert_equal(take(iterator, 100), expected)


def test_the_iterator_is_a_checkpointable_of_orbax(source, tmp_path):
    iterator = make_train_iterator(config(source))
    take(iterator, 11)
    ocp.save_checkpointables(tmp_path / "checkpoint", {"data": iterator})
    expected = take(iterator, 20)
    fresh = make_train_iterator(config(source))
    ocp.load_checkpointables(tmp_path / "checkpoint", {"data": fresh})
    assert_equal(take(fresh, 20), expected)


def test_processes_share_every_batch(source):
    whole = take(make_train_iterator(config(source), shard=NO_SHARDING), 50)
    parts = [
        take(make_train_iterator(config(source), shard=ShardOptions(i, 2)), 50) for i in range(2)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert [share["tokens"].shape for share in shares] == [(2, 16)] * 2
        assert rows_of(shares) == rows_of([batch])
    evaluated = [make_eval_batches(config(source), shard=ShardOptions(i, 2)) for i in range(2)]
    assert len(evaluated[0]) == len(evaluated[1])
    for batch, *shares in zip(make_eval_batches(config(source)), *evaluated, strict=True):
        assert rows_of(shares) == rows_of([batch])
        assert sum(share["num_bytes"] for share in shares) == batch["num_bytes"]


def test_the_state_is_the_same_for_every_number_of_processes(source):
    settings = config(source)
    iterator = make_train_iterator(settings, shard=ShardOptions(1, 2))
    take(iterator, 7)
    whole = make_train_iterator(settings, shard=NO_SHARDING)
    whole.set_state(json.loads(json.dumps(iterator.get_state())))
    for batch, share in zip(take(whole, 20), take(iterator, 20), strict=True):
        assert rows_of([batch])[2:] == rows_of([share])


def test_other_documents_cannot_go_on(source, tmp_path):
    state = make_train_iterator(config(source)).get_state()
    settings = config(source, max_documents=10)
    with pytest.raises(ValueError, match="other documents than when the checkpoint was made"):
        make_train_iterator(settings).set_state(state)


def test_a_batch_that_does_not_divide_over_the_processes(source):
    with pytest.raises(ValueError, match="data.batch_size=4 must be a multiple of the 3 proc"):
        make_train_iterator(config(source), shard=ShardOptions(0, 3))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_evaluation_counts_every_held_out_byte_and_target_once(source, packing):
    settings = config(source, packing=packing)
    corpus = load_corpus(settings)
    batches = make_eval_batches(settings)
    first, second = list(batches), list(batches)
    assert_equal(first, second)
    assert {key: first[0][key].shape for key in KEYS} == dict.fromkeys(KEYS, (4, 16))
    assert sorted(first[0]) == sorted([*KEYS, "num_bytes"])
    assert sum(b["num_bytes"] for b in first) == corpus.heldout.num_bytes.sum()
    assert sum(int(b["loss_mask"].sum()) for b in first) == corpus.heldout.lengths.sum()
    last = first[-1]
    assert last["loss_mask"].sum() < 64  # Partial in this corpus: the rest is padding.
    np.testing.assert_array_equal(last["segment_ids"][last["loss_mask"] == 0], -1)
    np.testing.assert_array_equal(last["tokens"][last["loss_mask"] == 0], 0)


def test_no_held_out_document_is_trained_on(source):
    settings = config(source, seq_len=64, packing="best_fit", batch_size=1)
    corpus = load_corpus(settings)

    def documents(batches):
        found = set()
        for batch in batches:
            for segment in set(batch["segment_ids"][0]) - {-1}:
                found.add(batch["tokens"][0][batch["segment_ids"][0] == segment].tobytes())
        return found

    trained = documents(take(make_train_iterator(settings, corpus=corpus), 300))
    heldout = documents(make_eval_batches(settings, corpus=corpus))
    assert len(trained) + len(heldout) == 300
    assert not trained & heldout


def test_max_batches(source):
    batches = list(make_eval_batches(config(source)))
    assert_equal(make_eval_batches(config(source), max_batches=3), batches[:3])
    assert_equal(make_eval_batches(config(source), max_batches=999), batches)
    with pytest.raises(ValueError, match="max_batches must be at least 1, got 0"):
        make_eval_batches(config(source), max_batches=0)


def test_empty_splits(source):
    with pytest.raises(EmptySplitError) as error:
        make_eval_batches(config(source, holdout_fraction=0.0))
    assert str(error.value) == (
        f"{source}: none of 300 documents is held out; set a larger holdout_fraction or more "
        "documents, or train with train.eval_batches=0; or evaluate on a source of its own with "
        "holdout_fraction=1.0"
    )
    with pytest.raises(EmptySplitError) as error:
        make_train_iterator(config(source, holdout_fraction=1.0))
    assert str(error.value) == (
        f"{source}: no documents to train on, all 300 are held out; lower holdout_fraction "
        "(1.0) or add documents"
    )


def test_a_corpus_smaller_than_a_batch_repeats(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    batch = next(make_train_iterator(config(str(tmp_path), holdout_fraction=0.0)))
    np.testing.assert_array_equal(batch["tokens"][:, :4], [[256, 97, 98, 99]] * 4)
    np.testing.assert_array_equal(batch["targets"][:, :4], [[97, 98, 99, 257]] * 4)


def test_the_iterator_is_grains(source):
    assert isinstance(make_train_iterator(config(source)), grain.DatasetIterator)
