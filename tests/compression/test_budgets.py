"""Budgets over depth, against the figures of the papers' settings."""

import numpy as np
import pytest

from fusedkv_jax.compression.budgets import pyramid_budgets, pyramid_lengths, recent_tokens


def test_pyramidkv_budgets_of_the_published_settings():
    budgets = pyramid_budgets(128, 8, 8192, 32, 20)
    assert budgets[:3] == (242, 235, 228) and budgets[-1] == 25
    assert np.mean(budgets) == 133.5
    wide = pyramid_budgets(2048, 8, 8192, 32, 20)
    assert (wide[0], wide[-1]) == (3986, 111)


@pytest.mark.parametrize("length", [100, 128, 239])
def test_pyramidkv_is_flat_for_short_prompts(length):
    assert pyramid_budgets(128, 8, length, 32, 20) == (min(length, 128),) * 32


def test_pyramidkv_never_asks_for_more_than_the_prompt():
    budgets = pyramid_budgets(128, 8, 241, 32, 20)
    assert budgets[0] == 241 and min(budgets) >= 8
    assert pyramid_budgets(128, 8, 8192, 1, 20) == (128,)


@pytest.mark.parametrize(
    "layers, ratio, interval, middle, last, mean",
    [(32, 0.9, 1, 1655, 768, 76.5), (40, 0.8, 2, 1590, 616, 72.3), (80, 0.9, 3, 1674, 821, 78.0)],
)
def test_pyramidinfer_lengths_of_the_published_settings(
    layers, ratio, interval, middle, last, mean
):
    kept = pyramid_lengths(2048, layers, ratio, interval)[2048]
    assert (kept[0], kept[layers // 2], kept[-1]) == (2048, middle, last)
    assert round(100 * kept.mean() / 2048, 1) == mean


def test_pyramidinfer_lengths_by_a_plain_loop():
    layers, ratio, interval = 7, 0.5, 2
    table = pyramid_lengths(300, layers, ratio, interval)
    assert (pyramid_lengths(300, layers, 1, interval) == np.arange(301)[:, None]).all()
    for length in range(301):
        recent = min(1 + int(0.2 * length), length)
        context = length - recent
        for layer in range(layers):
            assert table[length, layer] == context + recent
            if layer % interval == 0:
                share = (1 - ratio) * (np.cos(np.pi * layer / layers) + 1) / 2 + ratio
                if int(context * share) > 64:
                    context = int(context * share)
    assert recent_tokens(np.array([0, 1, 4, 5, 2048])).tolist() == [0, 1, 1, 2, 410]
