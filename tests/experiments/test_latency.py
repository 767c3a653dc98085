"""What `experiments.benchmarks.latency` times are the programs that users run."""

import numpy as np

import fusedkv_jax as fkv
from experiments.benchmarks import latency
from experiments.benchmarks.programs import counted_compilations
from tests.model import small


def test_latency_times_the_programs_of_generate():
    # Its fusion is folded for decoding, so a program that were not folded would be another one.
    config = small.config("fusedkv:parameterization=iterative", num_layers=4, d_model=8, d_ff=8)
    model, prompt = small.decoder(config), np.arange(20, dtype=np.int32)
    found = latency.measure({"model": model}, prompt, new_tokens=5, repeats=1)
    assert found["model"].first_token > 0 and found["model"].output_token > 0
    params = fkv.SamplingParams(temperature=0, max_tokens=5)
    with counted_compilations() as compiled:
        (delta, rest) = fkv.stream(model, [prompt], params, stream_interval=5)
    assert len(delta.token_ids + rest.token_ids) == 5
    assert compiled == []
