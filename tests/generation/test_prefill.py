"""Prefill: the same outputs however it is done, and upper layers for as few rows as can be."""

import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.generation.chunked_prefill import PrefillPlan, PromptArrays, chunks
from fusedkv_jax.generation.programs import GenerationPrograms
from fusedkv_jax.model.block import Block
from tests.model import small

GREEDY = fkv.SamplingParams(temperature=0, max_tokens=4)
FULL = fkv.SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0)
QUICK = ("fusedkv",)
ROWS = 64


def prompts(seed):
    """(20 of any length, 40 that begin with the same 17 tokens)."""
    rng = np.random.default_rng(seed)

    def tokens(least, most):
        return rng.integers(0, small.VOCAB, rng.integers(least, most)).tolist()

    prefix = tokens(17, 18)
    return [tokens(1, 29) for _ in range(20)], [prefix + tokens(1, 12) for _ in range(40)]


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, spec in small.SPECS.items()
    ],
)
def test_equal_tokens_however_prompts_are_prefilled(spec):
    """60 prompts for each layout: whole, in chunks, with a shared prefix, alone, all layers."""
    if spec.startswith("lckv"):
        spec = "lckv:forward_passes=31"  # exact for all of these lengths
    model = small.decoder(small.config(spec))
    mixed, alike = prompts(len(spec))

    def tokens(prompts, params=GREEDY, **settings):
        settings = {"batch_size": ROWS, "enable_prefix_caching": False, **settings}
        return [c.token_ids for c in fkv.generate(model, prompts, params, **settings)]

    whole = tokens(mixed + alike)
    assert len(set(whole)) > 10
    for width in (1, 8):
        assert tokens(mixed + alike, max_num_batched_tokens=ROWS * width) == whole
    assert tokens(alike, enable_prefix_caching=True) == whole[20:]
    assert tokens(mixed + alike, FULL) == whole
    some = [*mixed[:3], *alike[:2]]
    assert tokens(some, batch_size=1) == [*whole[:3], *whole[20:22]]


@pytest.mark.slow
def test_chunks_of_any_size():
    model = small.decoder(small.config("fusedkv", num_layers=4))
    mixed, _ = prompts(1)
    whole = fkv.generate(model, mixed, GREEDY)
    for width in (2, 3, 5, 7, 16, 27, 64):
        budget = width * len(mixed)
        found = fkv.generate(model, mixed, GREEDY, bucketing=False, max_num_batched_tokens=budget)
        assert found == whole, width


def test_chunks_end_together():
    lengths = np.array([5, 2, 0, 4])
    plan = chunks(lengths, 2)
    assert [counts.tolist() for _, counts in plan] == [[1, 0, 0, 0], [2, 0, 0, 2], [2, 2, 0, 2]]
    assert [starts.tolist()[0] for starts, _ in plan] == [0, 1, 3]
    assert [starts.tolist()[3] for starts, _ in plan] == [0, 0, 2]


@pytest.mark.parametrize(
    "spec",
    [
        "fusedkv",
        "cla:k=2",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("mha", "fusedkv_lite", "yoco")),
    ],
)
def test_rows_per_layer(spec, monkeypatch):
    """T rows in the layers that cache, one above in the last chunk, none in the others."""
    config = small.config(spec, scan_layers=False, d_model=20, num_layers=4)
    programs = GenerationPrograms.of(small.decoder(config))
    rows = []
    original = Block.project

    def count(self, x, rotation):
        rows.append(x.shape[1])
        return original(self, x, rotation)

    monkeypatch.setattr(Block, "project", count)
    length, depth, layers = 13, config.kv_layout.prefill_depth, config.num_layers
    tokens = np.asarray(small.tokens(2, length))
    lengths = np.array([length, length])

    def counted(**options):
        rows.clear()
        cache = fkv.KVCache.create(config, batch_size=2, max_length=length)
        programs.prefill(PromptArrays(tokens, lengths), cache, PrefillPlan(**options))
        return list(rows)

    assert counted() == [length] * depth + [1] * (layers - depth)
    # Chunks of equal shape are one program: it is counted once, the last chunk apart.
    assert counted(width=7) == [7] * depth + [7] * depth + [1] * (layers - depth)
    assert counted(width=6, final="none") == [6] * depth
    assert counted(k=1) == [length] * layers
