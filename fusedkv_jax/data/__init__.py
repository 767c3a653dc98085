"""Data: sources, tokenizers, packing, and the Grain pipelines for training and evaluation."""

from fusedkv_jax.data import tokenizers
from fusedkv_jax.data.config import DataConfig
from fusedkv_jax.data.corpus import Corpus, EmptySplitError, load_corpus
from fusedkv_jax.data.pipeline import make_eval_batches, make_train_iterator
from fusedkv_jax.data.tokenizers import Tokenizer

__all__ = [
    "Corpus",
    "DataConfig",
    "EmptySplitError",
    "Tokenizer",
    "load_corpus",
    "make_eval_batches",
    "make_train_iterator",
    "tokenizers",
]
