"""Data: sources, tokenizers, packing, and the Grain pipelines for training and evaluation."""

from typing import TYPE_CHECKING

from fusedkv_jax.lazy import lazy_names

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

if TYPE_CHECKING:
    from fusedkv_jax.data import tokenizers
    from fusedkv_jax.data.config import DataConfig
    from fusedkv_jax.data.corpus import Corpus, EmptySplitError, load_corpus
    from fusedkv_jax.data.pipeline import make_eval_batches, make_train_iterator
    from fusedkv_jax.data.tokenizers import Tokenizer
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        __all__,
        {
            "config": ["DataConfig"],
            "corpus": ["Corpus", "EmptySplitError", "load_corpus"],
            "pipeline": ["make_eval_batches", "make_train_iterator"],
            "tokenizers": ["Tokenizer"],
        },
    )
