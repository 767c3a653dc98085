"""Packing: every pair once, targets inside documents, and agreement with Grain's packers."""

import grain
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fusedkv_jax.data.packing import PackedSequences, best_fit_decreasing

PACKINGS = ("concat", "best_fit")


class Documents:
    """Documents whose every token is unique, so that each can be found again."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths, np.int64)
        self.num_bytes = 3 * self.lengths + 1
        self._starts = np.cumsum([0, *(self.lengths + 1)])

    def read(self, index, start=0, stop=None):
        return np.arange(self._starts[index], self._starts[index + 1])[start:stop]


def pack(lengths, packing, seq_len):
    documents = Documents(lengths)
    sequences = PackedSequences(documents, packing=packing, seq_len=seq_len)
    return documents, [sequences[i] for i in range(len(sequences))]


many_lengths = st.lists(st.integers(1, 40), max_size=25)


@pytest.mark.parametrize("packing", PACKINGS)
@hypothesis.given(lengths=many_lengths, seq_len=st.integers(1, 12))
def test_every_token_is_the_target_of_exactly_one_position(lengths, packing, seq_len):
    documents, rows = pack(lengths, packing, seq_len)
    tokens = [row["tokens"][row["loss_mask"] == 1] for row in rows]
    targets = [row["targets"][row["loss_mask"] == 1] for row in rows]
    documents = [documents.read(i) for i in range(len(lengths))]
    expected = np.concatenate([document[1:] for document in documents] or [[]])
    assert sorted(np.concatenate(targets or [[]])) == sorted(expected)
    inputs = np.concatenate([document[:-1] for document in documents] or [[]])
    assert sorted(np.concatenate(tokens or [[]])) == sorted(inputs)
    # Tokens are unique and consecutive in a document, and EOS is no input: so this says that
    # every target is the next token of the same document.
    for inputs, following in zip(tokens, targets, strict=True):
        np.testing.assert_array_equal(following, inputs + 1)


@pytest.mark.parametrize("packing", PACKINGS)
@hypothesis.given(lengths=many_lengths, seq_len=st.integers(1, 12))
def test_segments_positions_and_padding(lengths, packing, seq_len):
    documents, rows = pack(lengths, packing, seq_len)
    starts = documents._starts
    for row in rows:
        assert {name: array.dtype.name for name, array in row.items()} == {
            "tokens": "int32",
            "targets": "int32",
            "segment_ids": "int32",
            "positions": "int32",
            "loss_mask": "float32",
            "target_bytes": "int32",
        }
        real = row["loss_mask"] == 1
        used = int(real.sum())
        assert used and real[:used].all()  # Padding is at the end only.
        np.testing.assert_array_equal(row["segment_ids"][used:], -1)
        for name in ("tokens", "targets", "positions", "target_bytes"):
            np.testing.assert_array_equal(row[name][used:], 0)
        segments = row["segment_ids"][:used]
        assert segments[0] == 1 and set(np.diff(segments)) <= {0, 1}
        for segment in set(segments):
            here = np.flatnonzero(row["segment_ids"] == segment)
            np.testing.assert_array_equal(row["positions"][here], np.arange(len(here)))
            document = np.searchsorted(starts, row["tokens"][here], side="right")
            assert len(set(document)) == 1


@hypothesis.given(lengths=many_lengths, seq_len=st.integers(1, 12))
def test_concat_pads_the_last_sequence_only(lengths, seq_len):
    _, rows = pack(lengths, "concat", seq_len)
    assert len(rows) == -(-sum(lengths) // seq_len)
    assert all(row["loss_mask"].all() for row in rows[:-1])


@hypothesis.given(lengths=many_lengths, seq_len=st.integers(1, 12))
def test_best_fit_cuts_only_what_is_longer_than_a_sequence(lengths, seq_len):
    documents, rows = pack(lengths, "best_fit", seq_len)
    pieces = np.zeros(len(lengths), int)
    for row in rows:
        first = row["tokens"][(row["positions"] == 0) & (row["loss_mask"] == 1)]
        np.add.at(pieces, np.searchsorted(documents._starts, first, side="right") - 1, 1)
    np.testing.assert_array_equal(pieces, -(-np.array(lengths, int) // seq_len))


@pytest.mark.parametrize("packing", PACKINGS)
@hypothesis.given(lengths=many_lengths, seq_len=st.integers(1, 12))
def test_target_bytes_sum_to_each_documents_bytes(lengths, packing, seq_len):
    documents, rows = pack(lengths, packing, seq_len)
    total = np.zeros(len(lengths), int)
    for row in rows:
        real = row["loss_mask"] == 1
        index = np.searchsorted(documents._starts, row["tokens"][real], side="right") - 1
        np.add.at(total, index, row["target_bytes"][real])
    np.testing.assert_array_equal(total, documents.num_bytes)


def test_concat_at_the_borders_of_a_small_example():
    # BOS=9, EOS=8. Documents 1 2 3 | 4 | 5 6 in sequences of 4 pairs.
    class Small:
        lengths = np.array([4, 2, 3])
        num_bytes = np.array([3, 1, 2])
        rows = ([9, 1, 2, 3, 8], [9, 4, 8], [9, 5, 6, 8])

        def read(self, index, start=0, stop=None):
            return np.array(self.rows[index])[start:stop]

    sequences = PackedSequences(Small(), packing="concat", seq_len=4)
    first, second, third = (sequences[i] for i in range(len(sequences)))
    np.testing.assert_array_equal(first["tokens"], [9, 1, 2, 3])
    np.testing.assert_array_equal(first["targets"], [1, 2, 3, 8])
    np.testing.assert_array_equal(second["tokens"], [9, 4, 9, 5])
    np.testing.assert_array_equal(second["targets"], [4, 8, 5, 6])
    np.testing.assert_array_equal(second["segment_ids"], [1, 1, 2, 2])
    np.testing.assert_array_equal(second["positions"], [0, 1, 0, 1])
    np.testing.assert_array_equal(third["tokens"], [6, 0, 0, 0])
    np.testing.assert_array_equal(third["targets"], [8, 0, 0, 0])
    np.testing.assert_array_equal(third["segment_ids"], [1, -1, -1, -1])
    np.testing.assert_array_equal(third["loss_mask"], [1, 0, 0, 0])


@hypothesis.given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=25))
def test_concat_equals_grains_where_no_document_fills_a_sequence(lengths):
    documents, rows = pack(lengths, "concat", 10)
    elements = [
        {"tokens": documents.read(i)[:-1], "targets": documents.read(i)[1:]}
        for i in range(len(lengths))
    ]
    theirs = grain.experimental.ConcatThenSplitIterDataset(
        grain.MapDataset.source(elements).to_iter_dataset(),
        length_struct={"tokens": 10, "targets": 10},
    )
    for row, their in zip(rows, theirs, strict=True):
        real = row["loss_mask"] == 1
        np.testing.assert_array_equal(row["tokens"], their["tokens"])
        np.testing.assert_array_equal(row["targets"], their["targets"])
        np.testing.assert_array_equal(row["segment_ids"][real], their["tokens_segment_ids"][real])
        np.testing.assert_array_equal(row["positions"], their["tokens_positions"])


def test_best_fit_equals_grains_given_the_longest_first():
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.integers(1, 100, 500))[::-1]
    ours = best_fit_decreasing(lengths, 100)
    theirs = grain.experimental.BestFitPackIterDataset(
        grain.MapDataset.source([{"t": np.ones(n)} for n in lengths]).to_iter_dataset(),
        length_struct={"t": 100},
        num_packing_bins=500,
        shuffle_bins=False,
    )
    # Which of several equally full bins takes an item differs; how full they get does not.
    loads = sorted(int(lengths[items].sum()) for items in ours)
    assert loads == sorted(np.count_nonzero(row["t"]) for row in theirs)


@hypothesis.given(sizes=st.lists(st.integers(0, 20), max_size=60))
def test_best_fit_decreasing_is_a_tight_packing(sizes):
    sizes = np.array(sizes, np.int64)
    bins = best_fit_decreasing(sizes, 20)
    assert sorted(i for items in bins for i in items) == np.flatnonzero(sizes).tolist()
    loads = sorted(int(sizes[items].sum()) for items in bins)
    assert all(0 < load <= 20 for load in loads)
    if len(loads) > 1:
        assert loads[0] + loads[1] > 20  # Otherwise the last bin was opened without need.
