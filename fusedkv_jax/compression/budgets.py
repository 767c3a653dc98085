"""How many tokens each layer keeps: the pyramids of PyramidKV and PyramidInfer."""

from __future__ import annotations

import numpy as np


def pyramid_budgets(
    budget: int, window: int, length: int, layers: int, beta: int
) -> tuple[int, ...]:
    """Tokens that PyramidKV keeps in each layer (arXiv 2406.02069), the window included.

    Budgets fall evenly with depth around `budget`; prompts shorter than twice the budget get
    `budget` everywhere.
    """
    extra = budget - window
    if length < 2 * extra or layers == 1:
        return (min(budget, length),) * layers
    low = extra // beta
    high = 2 * extra - low
    if high >= length - window:
        high = length - window
        low = 2 * extra - high
    step = (high - low) // (layers - 1)
    return tuple(high - layer * step + window for layer in range(layers))


RECENT_SHARE = 0.2  # of the prompt, never pruned
FIRST_TOKENS = 4  # never pruned
SMALLEST_CONTEXT = 64  # pruning that would leave no more than this is skipped


def recent_tokens(lengths: np.ndarray) -> np.ndarray:
    """The last tokens of a prompt that PyramidInfer keeps, and whose attention scores the rest."""
    return np.minimum(1 + (RECENT_SHARE * lengths).astype(np.int64), lengths)


def pyramid_lengths(most: int, layers: int, ratio: float, interval: int) -> np.ndarray:
    """Tokens that enter each layer in PyramidInfer's prefill (arXiv 2405.12532).

    After each `interval`-th layer l the context, all but the recent tokens, is cut to its
    (1 - p)(cos(pi l / L) + 1) / 2 + p, where that is more than 64 tokens.

    Args:
        most: longest prompt.
        layers: number of layers L.
        ratio: p, the share that the last cut would keep; 1 prunes nothing.
        interval: layers between cuts.

    Returns:
        int [most + 1, layers]: for every prompt length, tokens that each layer sees and stores.
    """
    lengths = np.arange(most + 1)
    recent = recent_tokens(lengths)
    context = lengths - recent
    table = []
    for layer in range(layers):
        table.append(context + recent)
        if layer % interval == 0:
            share = (1 - ratio) * (np.cos(np.pi * layer / layers) + 1) / 2 + ratio
            cut = (context * share).astype(np.int64)
            context = np.where(cut > SMALLEST_CONTEXT, cut, context)
    return np.stack(table, axis=1)
