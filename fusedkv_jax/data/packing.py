"""Packing: which pieces of which documents make up each training sequence, decided once.

A document of n tokens is stored as BOS, its tokens, EOS, and gives n + 1 (input, target) pairs:
each position's target is the token after it. Pairs, not tokens, are packed. So no target ever
crosses into another document, a sequence needs no extra token, and over one epoch **every token
of the corpus and every EOS is the target of exactly one position** in both packings.

A document longer than a sequence is cut into pieces of T pairs. Full pieces are sequences of
their own; what is left of each document, its last piece of fewer than T pairs, is
- "concat": concatenated in corpus order and cut every T pairs. Only the last sequence has
  padding;
- "best_fit": placed whole, the longest first, where it leaves the least room (best-fit
  decreasing, as in "Fewer Truncations Improve Language Modeling", arXiv 2404.10830). Only
  documents longer than a sequence are ever cut.

The plan is a function of the document lengths alone, so sequence i can be read at any time: the
pipeline shuffles all sequences, and its state is one number. (Grain's packers work on a stream.
With them the pieces of a long file follow one another in the batches, and keeping full pieces
whole, `split_full_length_features=False`, reads ahead without bound where few documents leave a
remainder. The tests hold this file against them where the two must agree.)
"""

import bisect
import dataclasses
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np

PADDING_SEGMENT = -1


@runtime_checkable
class TokenizedDocuments(Protocol):
    """Documents as tokens, by index."""

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64, the number of (input, target) pairs: tokens of the text plus one."""
        ...

    @property
    def num_bytes(self) -> np.ndarray:
        """[N] int64, the UTF-8 bytes of the text."""
        ...

    def read(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns ids `start` to `stop` of document `index`: of BOS, its text's tokens, EOS.

        There are lengths[index] + 1 of them; `stop` is exclusive, by default their end.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """Pairs start to stop (exclusive) of one document."""

    document: int
    start: int
    stop: int


class ConcatPlan:
    """Full pieces, then the remainders of all documents end to end."""

    def __init__(self, lengths: np.ndarray, seq_len: int) -> None:
        self._seq_len = seq_len
        self._full = _FullPieces(lengths, seq_len)
        remainders = lengths % seq_len
        self._documents = np.flatnonzero(remainders)
        self._ends = np.cumsum(remainders[self._documents])  # In the concatenated stream.
        self._lengths = lengths
        total = int(self._ends[-1]) if self._ends.size else 0
        self._num_mixed = -(-total // seq_len)

    def __len__(self) -> int:
        return len(self._full) + self._num_mixed

    def __getitem__(self, index: int) -> list[Excerpt]:
        """Returns the pieces of sequence `index` in order."""
        if index < len(self._full):
            return [self._full[index]]
        return list(self._mixed(index - len(self._full)))

    def _mixed(self, index: int) -> Iterator[Excerpt]:
        low, high = index * self._seq_len, (index + 1) * self._seq_len
        row = int(np.searchsorted(self._ends, low, side="right"))
        while row < len(self._ends) and low < high:
            document, end = int(self._documents[row]), int(self._ends[row])
            take = min(end, high) - low
            start = int(self._lengths[document]) - (end - low)
            yield Excerpt(document, start, start + take)
            low += take
            row += 1


class BestFitPlan:
    """Full pieces, then bins of whole remainders."""

    def __init__(self, lengths: np.ndarray, seq_len: int) -> None:
        self._full = _FullPieces(lengths, seq_len)
        self._lengths = lengths
        self._remainders = lengths % seq_len
        self._bins = best_fit_decreasing(self._remainders, seq_len)

    def __len__(self) -> int:
        return len(self._full) + len(self._bins)

    def __getitem__(self, index: int) -> list[Excerpt]:
        """Returns the pieces of sequence `index` in order."""
        if index < len(self._full):
            return [self._full[index]]
        pieces = []
        for document in self._bins[index - len(self._full)]:
            stop = int(self._lengths[document])
            pieces.append(Excerpt(document, stop - int(self._remainders[document]), stop))
        return pieces


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Packs items into bins: the largest item first, each into the fullest bin that takes it.

    Args:
      sizes: [N] item sizes, 0 to `capacity`; items of size 0 are left out.
      capacity: the size of a bin.

    Returns:
      The item indices of each bin; O(N log capacity) in time.
    """
    bins: list[list[int]] = []
    room: list[int] = []  # The distinct free sizes, ascending.
    bins_with_room: dict[int, list[int]] = {}
    for item in np.argsort(-sizes, kind="stable"):
        size = int(sizes[item])
        if size == 0:
            break
        place = bisect.bisect_left(room, size)
        if place == len(room):
            bins.append([])
            chosen, free = len(bins) - 1, capacity
        else:
            free = room[place]
            chosen = bins_with_room[free].pop()
            if not bins_with_room[free]:
                del bins_with_room[free], room[place]
        bins[chosen].append(int(item))
        left = free - size
        if left:
            if left not in bins_with_room:
                bins_with_room[left] = []
                bisect.insort(room, left)
            bins_with_room[left].append(chosen)
    return bins


class PackedSequences:
    """The sequences of a corpus by index, each a dict of arrays of length T.

    Keys: tokens and targets (int32; 0 where padding), segment_ids (int32; 1, 2, ... for the
    pieces in order, -1 for padding), positions (int32; from 0 in each piece), loss_mask
    (float32; 1 for a real target), and target_bytes (int32; the UTF-8 bytes of text that a
    target stands for: its document's bytes spread evenly over its targets in whole numbers, so
    that sums over whole documents are exact for every tokenizer).
    """

    def __init__(self, documents: TokenizedDocuments, *, packing: str, seq_len: int) -> None:
        plans = {"concat": ConcatPlan, "best_fit": BestFitPlan}
        self._documents = documents
        self._seq_len = seq_len
        self._plan = plans[packing](documents.lengths, seq_len)
        self._lengths, self._num_bytes = documents.lengths, documents.num_bytes

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = empty_sequence(self._seq_len)
        low = 0
        for segment, piece in enumerate(self._plan[index], 1):
            # One token more than pairs: the target of the last.
            tokens = self._documents.read(piece.document, piece.start, piece.stop + 1)
            here = slice(low, low + piece.stop - piece.start)
            row["tokens"][here] = tokens[:-1]
            row["targets"][here] = tokens[1:]
            row["segment_ids"][here] = segment
            # Tokens attend within their segment only, so positions begin anew with it.
            row["positions"][here] = np.arange(piece.stop - piece.start)
            row["loss_mask"][here] = 1
            row["target_bytes"][here] = self._target_bytes(piece)
            low = here.stop
        return row

    def _target_bytes(self, piece: Excerpt) -> np.ndarray:
        num_bytes, length = self._num_bytes[piece.document], self._lengths[piece.document]
        return np.diff(np.arange(piece.start, piece.stop + 1) * num_bytes // length)


def empty_sequence(seq_len: int) -> dict[str, np.ndarray]:
    """Returns a sequence of padding only, in the form of `PackedSequences`."""
    return {
        "tokens": np.zeros(seq_len, np.int32),
        "targets": np.zeros(seq_len, np.int32),
        "segment_ids": np.full(seq_len, PADDING_SEGMENT, np.int32),
        "positions": np.zeros(seq_len, np.int32),
        "loss_mask": np.zeros(seq_len, np.float32),
        "target_bytes": np.zeros(seq_len, np.int32),
    }


class _FullPieces:
    """All pieces of exactly seq_len pairs, by index."""

    def __init__(self, lengths: np.ndarray, seq_len: int) -> None:
        self._seq_len = seq_len
        self._ends = np.cumsum(lengths // seq_len)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def __getitem__(self, index: int) -> Excerpt:
        document = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[document - 1]) if document else 0
        start = (index - before) * self._seq_len
        return Excerpt(document, start, start + self._seq_len)
