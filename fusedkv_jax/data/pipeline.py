"""The Grain pipelines: endless shuffled batches for training, one pass for evaluation.

Both yield dicts of arrays [B, T]: tokens, targets, segment_ids, positions (int32) and loss_mask
(float32), as `packing.PackedSequences` describes them. With several JAX processes each gets its
own B / processes rows of every batch, process 0 the first ones, and as many batches.
"""

import hashlib

import grain
import numpy as np

from fusedkv_jax.data.config import DataConfig
from fusedkv_jax.data.corpus import Corpus, EmptySplitError, load_corpus
from fusedkv_jax.data.mixture import JoinedDocuments, Mixture
from fusedkv_jax.data.packing import PackedSequences, TokenizedDocuments, empty_sequence
from fusedkv_jax.data.recall import RecallSequences
from fusedkv_jax.data.shards import ShardDocuments

Batch = dict[str, np.ndarray]
Sequences = PackedSequences | RecallSequences


class TrainBatches(grain.DatasetIterator):
    """Batches that go on where they were, or say that the documents are not those of before.

    Its state is the next batch's number, whatever the number of processes, and what identifies
    the documents.

    Args:
      batches: the iterator of one process's rows.
      source: the name of the corpus, for the message.
      corpus: from `fingerprint`.
    """

    def __init__(self, batches: grain.DatasetIterator, source: str, corpus: str) -> None:
        super().__init__(batches)
        self._source, self.corpus = source, corpus

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, object]:
        return {**self._parent.get_state(), "corpus": self.corpus}

    def set_state(self, state: dict[str, object]) -> None:
        """Continue from a state.

        Raises:
          ValueError: it belongs to other documents.
        """
        state = dict(state)
        saved = state.pop("corpus")
        if saved != self.corpus:
            raise ValueError(
                f"data.source={self._source} has other documents than when the checkpoint was made "
                f"({self.corpus}, then {saved}), so its batches cannot go on; put them back, or "
                "use another --workdir"
            )
        self._parent.set_state(state)


def fingerprint(documents: TokenizedDocuments | RecallSequences) -> str:
    """Short text that changes with the number, the order or the size of any document."""
    if isinstance(documents, RecallSequences):
        return "recall"  # made from the configuration alone
    digest = hashlib.sha256()
    if isinstance(documents, Mixture):
        counts = [len(part.lengths) for part in documents.parts]
        digest.update(repr((counts, documents.weights)).encode())
    for sizes in (documents.lengths, documents.num_bytes):
        digest.update(np.ascontiguousarray(sizes).tobytes())
    return digest.hexdigest()[:16]


def make_train_iterator(
    config: DataConfig,
    *,
    corpus: Corpus | None = None,
    shard: grain.sharding.ShardOptions | None = None,
) -> TrainBatches:
    """Returns an endless iterator over training batches.

    Each epoch goes once through all sequences of the training split in an order that `seed` and
    the number of the epoch decide; batches run on across epochs. `get_state` and `set_state`
    (one number, the next batch) resume bit for bit with any number of threads and processes, and
    Orbax takes the iterator as a checkpointable.

    Args:
      config: what to read.
      corpus: the corpus of this config if it is loaded already.
      shard: which rows of each batch; by default those of this JAX process.

    Raises:
      EmptySplitError: every document is held out. ValueError, FileNotFoundError: as
        `load_corpus`, or a batch that does not divide over the processes.
    """
    corpus = corpus or load_corpus(config)
    dataset = _batch(_shuffled(corpus, config), config, shard).map(_without_bytes)
    options = grain.ReadOptions(
        num_threads=config.num_threads,
        prefetch_buffer_size=config.prefetch_batches if config.num_threads else 0,
    )
    batches = iter(dataset.to_iter_dataset(options))
    return TrainBatches(batches, config.source, fingerprint(corpus.train))


def make_eval_batches(
    config: DataConfig,
    max_batches: int | None = None,
    *,
    corpus: Corpus | None = None,
    shard: grain.sharding.ShardOptions | None = None,
) -> grain.MapDataset:
    """Returns the batches of the held-out split: finite, in fixed order, iterable many times.

    Rows that fill up the last batch are padding (loss_mask 0). Each batch also has `num_bytes`,
    an int: the UTF-8 bytes of text that its targets (of this process's rows) stand for, so bits
    per byte are the summed loss in nats / (ln 2 * summed bytes). Over the whole split that is
    exact for every tokenizer; with `max_batches`, documents that it cuts off count with their
    mean bytes per token.

    Raises:
      EmptySplitError: nothing is held out. Others as `make_train_iterator`.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    corpus = corpus or load_corpus(config)
    sequences = _pack(corpus.heldout, config)
    if not len(sequences):
        raise EmptySplitError(
            f"{config.source}: none of {_count(corpus.train)} documents is held out; "
            f"{_remedy(corpus)}"
        )
    padded = _PaddedSequences(sequences, config.batch_size, empty_sequence(config.seq_len))
    dataset = _batch(grain.MapDataset.source(padded), config, shard).map(_sum_bytes)
    return dataset if max_batches is None else dataset[:max_batches]


def _shuffled(corpus: Corpus, config: DataConfig) -> grain.MapDataset:
    """The training sequences without end; of several sources, as many of each as it weighs."""
    documents = corpus.train
    if not isinstance(documents, Mixture):
        return _epochs(documents, config, config.source, _count(corpus.heldout), config.seed)
    assert isinstance(corpus.heldout, JoinedDocuments)
    parts = zip(documents.parts, documents.names, corpus.heldout.parts, strict=True)
    # Seeds of their own: sources of one size are not to go round in one order.
    datasets = [
        _epochs(part, config, name, _count(heldout), (config.seed + i) % 2**32)
        for i, (part, name, heldout) in enumerate(parts)
    ]
    return grain.MapDataset.mix(datasets, documents.weights)


def _epochs(
    documents: TokenizedDocuments | RecallSequences,
    config: DataConfig,
    source: str,
    num_heldout: int,
    seed: int,
) -> grain.MapDataset:
    sequences = _pack(documents, config)
    if not len(sequences):
        raise EmptySplitError(
            f"{source}: no documents to train on, all {num_heldout} are held out; lower "
            f"holdout_fraction ({config.holdout_fraction}) or add documents"
        )
    # Every stage finds its element by index, so batch i is known without those before it: the whole
    # state is one number, and a run that is resumed draws nothing twice. A stream that is shuffled
    # would have to save what waits in its buffer.
    return grain.MapDataset.source(sequences).seed(seed).shuffle().repeat()


def _pack(documents: TokenizedDocuments | RecallSequences, config: DataConfig) -> Sequences:
    if isinstance(documents, RecallSequences):
        return documents
    return PackedSequences(documents, packing=config.packing, seq_len=config.seq_len)


def _remedy(corpus: Corpus) -> str:
    more = "a larger holdout_fraction or more documents, or train with train.eval_batches=0"
    if isinstance(corpus.train, ShardDocuments):  # which keep their split
        return f"prepare the shards again with {more}"
    return f"set {more}; or evaluate on a source of its own with holdout_fraction=1.0"


def _count(documents: TokenizedDocuments | RecallSequences) -> int:
    return len(documents if isinstance(documents, RecallSequences) else documents.lengths)


def _batch(
    dataset: grain.MapDataset, config: DataConfig, shard: grain.sharding.ShardOptions | None
) -> grain.MapDataset:
    shard = shard or grain.sharding.ShardByJaxProcess()
    rows, rest = divmod(config.batch_size, shard.shard_count)
    if rest:
        raise ValueError(
            f"data.batch_size={config.batch_size} must be a multiple of the "
            f"{shard.shard_count} processes"
        )
    # Parts of a batch, not single rows, go round: put side by side they are the whole batch.
    return dataset.batch(rows, drop_remainder=True)[shard.shard_index :: shard.shard_count]


def _without_bytes(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "target_bytes"}


def _sum_bytes(batch: Batch) -> dict[str, np.ndarray | int]:
    return {**_without_bytes(batch), "num_bytes": int(batch["target_bytes"].sum())}


class _PaddedSequences:
    """`sequences`, followed by padding up to a multiple of the batch size."""

    def __init__(self, sequences: Sequences, multiple: int, padding: Batch) -> None:
        self._sequences, self._padding = sequences, padding
        self._length = -(-len(sequences) // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        return self._sequences[index] if index < len(self._sequences) else self._padding
