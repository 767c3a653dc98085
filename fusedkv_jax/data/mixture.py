"""Several sources as one corpus: trained on by weight, evaluated one after the other."""

from collections.abc import Sequence

import numpy as np

from fusedkv_jax.data.packing import TokenizedDocuments


class JoinedDocuments:
    """The documents of several sources, one source after the other.

    Args:
      names: of the sources, for messages.
      parts: their documents.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[TokenizedDocuments]) -> None:
        self.names, self.parts = tuple(names), tuple(parts)
        self._starts = np.cumsum([0, *(len(part.lengths) for part in parts)])

    @property
    def lengths(self) -> np.ndarray:
        return np.concatenate([part.lengths for part in self.parts])

    @property
    def num_bytes(self) -> np.ndarray:
        return np.concatenate([part.num_bytes for part in self.parts])

    def read(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns ids `start` to `stop` of a document; see `packing.TokenizedDocuments`."""
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[place].read(index - int(self._starts[place]), start, stop)


class Mixture(JoinedDocuments):
    """Documents to train on: each source has its weight's share of the sequences.

    Args:
      names: of the sources.
      parts: their documents.
      weights: of the sources, above 0; their sum does not matter.
    """

    def __init__(
        self,
        names: Sequence[str],
        parts: Sequence[TokenizedDocuments],
        weights: Sequence[float],
    ) -> None:
        super().__init__(names, parts)
        self.weights = tuple(weights)
