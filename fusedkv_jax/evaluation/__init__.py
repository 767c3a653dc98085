"""Evaluation: long-context recall, agreement with the whole cache, perplexity at length."""

from fusedkv_jax.evaluation.agreement import Agreement, agreement, exact_matches
from fusedkv_jax.evaluation.longcontext import (
    Case,
    Method,
    Score,
    Writing,
    equal_shapes,
    evaluate_case,
    recall_case,
    ruler_case,
    text_case,
)
from fusedkv_jax.evaluation.perplexity import Perplexity, at_length, total
from fusedkv_jax.evaluation.replay import Replay, Split, replay, split

__all__ = [
    "Agreement",
    "Case",
    "Method",
    "Perplexity",
    "Replay",
    "Score",
    "Split",
    "Writing",
    "agreement",
    "at_length",
    "equal_shapes",
    "evaluate_case",
    "exact_matches",
    "recall_case",
    "replay",
    "ruler_case",
    "split",
    "text_case",
    "total",
]
