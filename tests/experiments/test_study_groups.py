"""Groups of targets, beside a count by hand and a program that takes one target at a time."""

import collections
import itertools

import numpy as np
import pytest

from experiments.study import recalled


class Documents:
    """Tokenized documents in memory."""

    def __init__(self, *documents):
        self.documents = [np.array(ids, np.uint16) for ids in documents]
        self.lengths = np.array([len(ids) for ids in documents])

    def read(self, index):
        return self.documents[index]


def numbers(*pairs):
    """What stands for some pairs among the common ones."""
    first, second = np.array(sorted(pairs)).T
    return (first << 32) + second


@pytest.mark.parametrize("chunk", [1, 5, 2**22])
def test_common_pairs_are_counted_within_documents(monkeypatch, chunk):
    monkeypatch.setattr(recalled, "_CHUNK", chunk)
    documents = Documents([1, 2, 1, 2, 3], [], [7], [3, 1, 2, 60_000])
    # Of seven pairs 1-2 are three, all others one each; none crosses documents.
    every = numbers((1, 2), (2, 1), (2, 3), (3, 1), (2, 60_000))
    assert recalled.common_pairs(documents).tolist() == every.tolist()
    monkeypatch.setattr(recalled, "RARE", 1 / 7)
    assert recalled.common_pairs(documents).tolist() == numbers((1, 2)).tolist()
    monkeypatch.setattr(recalled, "RARE", 3 / 7)
    assert not len(recalled.common_pairs(documents))


def test_pairs_are_recalled_within_a_document_where_they_are_rare():
    batch = {
        "tokens": np.array([[2, 3, 2, 3, 1, 2, 3, 2], [2, 3, 2, 3, 2, 0, 0, 0]]),
        "targets": np.array([[3, 2, 3, 1, 2, 3, 2, 3], [3, 2, 3, 2, 1, 0, 0, 0]]),
        "segment_ids": np.array([[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, -1, -1, -1]]),
        "loss_mask": np.array([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]], np.float32),
    }
    found = recalled.masks(batch, numbers((1, 2), (2, 1), (3, 1)))
    places = {name: [tuple(place) for place in np.argwhere(mask)] for name, mask in found.items()}
    assert places["recalled"] == [(0, 2), (0, 7), (1, 2), (1, 3)]
    assert places["repeated"] == []
    assert sum(len(found) for found in places.values()) == 13
    found = recalled.masks(batch, numbers((1, 2), (2, 1), (2, 3), (3, 1)))
    assert np.argwhere(found["repeated"]).tolist() == [[0, 2], [0, 7], [1, 2]]


def test_groups_are_those_of_a_slow_program():
    rng = np.random.default_rng(0)
    ids = rng.choice([0, 1, 2, 4_095, 49_999, 150_000], (4, 41))
    segments = np.sort(rng.integers(1, 4, (4, 40)), axis=1)
    segments[:, 35:] = -1
    mask = (segments > 0) & (rng.random((4, 40)) < 0.9)
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": segments,
        "loss_mask": mask.astype(np.float32),
    }
    pairs = list(itertools.product(np.unique(ids).tolist(), repeat=2))
    common = set(pairs[::3])
    expected = collections.defaultdict(set)
    for row in range(4):
        earlier = set()
        for place in range(35):
            pair = ids[row, place], ids[row, place + 1]
            context = segments[row, place]
            if mask[row, place]:
                group = "repeated" if pair in common else "recalled"
                expected[group if (context, *pair) in earlier else "new"].add((row, place))
            earlier.add((context, *pair))
    for name, found in recalled.masks(batch, numbers(*common)).items():
        assert {tuple(place) for place in np.argwhere(found).tolist()} == expected[name]
        assert expected[name]
