"""Under `jax_enable_x64` all computes what it computes without."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax import compression
from tests.model import small
from tests.training import golden

PROMPTS = [list(range(1, 21)), [5, 6, 7]]
GREEDY = fkv.SamplingParams(temperature=0.0, max_tokens=3)
DRAWN = fkv.SamplingParams(
    n=2, seed=1, top_k=9, top_p=0.9, min_p=0.01, max_tokens=3, logprobs=1, prompt_logprobs=1,
    repetition_penalty=1.1,
)  # fmt: skip


def model(spec: str, geometry: str = "gqa", **changes) -> fkv.Decoder:
    layers = 8 if "window" in spec else 4
    return small.decoder(small.config(spec, geometry, num_layers=layers, d_model=16, **changes))


def tokens(completions: list[fkv.Completion]) -> list[list[tuple[int, ...]]]:
    return [[output.token_ids for output in completion.outputs] for completion in completions]


def generated(spec: str, params: fkv.SamplingParams = GREEDY, **settings):
    return lambda: tokens(fkv.generate(model(spec), PROMPTS, params, **settings))


def served(**settings):
    shape = dict(max_num_seqs=2, max_model_len=32, max_num_batched_tokens=16, page_size=4)
    return lambda: tokens(
        fkv.LLM(model("fusedkv"), **{**shape, **settings}).generate(PROMPTS, DRAWN)
    )


def calibrated() -> list[list[tuple[int, ...]]]:
    sparsity = compression.DoubleSparsity(budget=8, dense_layers=1)
    sparsity = sparsity.calibrate(model("mha"), jnp.arange(16, dtype=jnp.int32).reshape(2, 8))
    return generated("mha", compression=sparsity)()


def draws(seed: int = 4) -> fkv.SamplingParams:
    return fkv.SamplingParams(seed=seed, max_tokens=6)


def trained(layout: str) -> list[float]:
    return [round(loss, 5) for loss in golden.losses(layout, steps=2)]


QUICK = {
    "drawn": generated("fusedkv", DRAWN),
    "h2o": generated("fusedkv", compression=compression.H2O(budget=8)),
    "drafts": generated("fusedkv", draws(), speculation=fkv.SelfSpeculation(draft_tokens=2)),
}
SLOW = {
    "trained": lambda: trained("fusedkv"),
    "served": served(),
    "beam": lambda: tokens(
        fkv.beam_search(model("fusedkv"), PROMPTS, fkv.BeamSearchParams(max_tokens=3))
    ),
    "cyclic": generated("lckv:forward_passes=3"),
    "ring": generated("window_hybrid:window=5,full_every=2", max_num_batched_tokens=8),
    "latent": lambda: tokens(fkv.generate(model("fusedkv", "mla"), PROMPTS, GREEDY)),
    "int8": generated("fusedkv", cache_dtype="int8"),
    "int4": generated("fusedkv", cache_dtype="int4"),
    "snapkv": generated("fusedkv", compression=compression.SnapKV(budget=8, window=4)),
    "pyramidkv": generated("mha", compression=compression.PyramidKV(budget=8, window=4)),
    "pyramidinfer": generated("mha", compression=compression.PyramidInfer(budget=0.3)),
    "minicache": generated("mha", compression=compression.MiniCache(budget=4, start=0)),
    "double_sparsity": calibrated,
    "streaming_llm": generated("fusedkv", compression=compression.StreamingLLM(budget=8)),
    "served_drafts": served(speculation=fkv.SelfSpeculation(draft_tokens=2)),
    "served_slots": served(cache_dtype="int4"),
    "trained_cyclic": lambda: trained("lckv"),
}


@pytest.mark.parametrize(
    "compute",
    [
        *(pytest.param(case, id=name) for name, case in QUICK.items()),
        *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
    ],
)
def test_wide_types_change_nothing(compute: Callable[[], list]):
    found = []
    for wide in (False, True):
        with jax.enable_x64(wide):
            found.append(compute())
    assert found[0] == found[1]


def test_the_state_of_a_run_has_the_same_types():
    config, optimizer = golden.small_config("fusedkv"), golden.make_optimizer(golden.OPTIMIZER, 9)
    with jax.enable_x64(True):
        state = golden.create_state(config, optimizer, 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {np.dtype("f4"), np.dtype("i4")}
