"""The generate binary: what it writes, and its mistakes."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import generate, runs
from fusedkv_jax import SamplingParams
from fusedkv_jax.data import tokenizers
from fusedkv_jax.training import load_model
from tests.experiments import commands


@pytest.fixture(scope="module")
def workdir(comparison_config, tmp_path_factory):
    """Directory of a finished run; its context is 64 tokens."""
    return runs.complete(comparison_config, tmp_path_factory.mktemp("run")).workdir


def greedy(model, tokens, count):
    """The likeliest continuation, each token from a forward pass over everything before it."""
    padded = np.zeros((1, 64), np.int32)
    for place in range(len(tokens), len(tokens) + count):
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(model(jnp.asarray(padded)))[0, place - 1]
        tokens = [*tokens, int(logits.argmax())]
    return tokens[-count:]


def test_continues_a_document_that_begins_with_the_prompt(workdir):
    model, _, _ = load_model(workdir)
    tokenizer = tokenizers.load("byte")
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = ["def größe(", "x"]
    for prompt, completion in zip(
        prompts, generate.continue_texts(model, tokenizer, prompts, params), strict=True
    ):
        assert completion.prompt_token_ids == (256, *prompt.encode())
        expected = greedy(model, list(completion.prompt_token_ids), 12)
        assert list(completion.token_ids) == expected
        assert completion.text == bytes(t for t in expected if t < 256).decode("utf-8", "replace")


@pytest.mark.usefixtures("share_compiled_programs")
def test_prints_prompts_and_completions(workdir):
    where = f"--workdir={workdir}"
    prompts = ["--prompt=def ", "--prompt=return cache"]
    greedily = [where, *prompts, "--max_tokens=8", "--temperature=0"]
    drawn = [where, *prompts, "--max_tokens=8", "--temperature=1.5"]
    outputs = commands.run(
        "generate",
        greedily,
        [*drawn, "--top_k=1"],  # greedy by another name
        [*drawn, "--seed=3"],
        [*drawn, "--seed=3"],
        [*drawn, "--seed=4"],
    )
    assert [(code, error) for code, _, error in outputs] == [(0, "")] * 5
    first, again, three, three_again, four = (out for _, out, _ in outputs)
    assert first == again != three == three_again != four
    model, _, _ = load_model(workdir)
    tokenizer = tokenizers.load("byte")
    params = SamplingParams(temperature=0.0, max_tokens=8)
    expected = []
    for number, prompt in enumerate(("def ", "return cache"), 1):
        (completion,) = generate.continue_texts(model, tokenizer, [prompt], params)
        expected.append(
            f"=== toy at step 12, prompt {number} of 2: {len(completion.token_ids)} tokens, "
            f"ended by {completion.finish_reason}\n{prompt}{completion.text}\n"
        )
    assert first == "".join(expected)


def test_mistakes(workdir, tmp_path):
    where, prompt = f"--workdir={workdir}", "--prompt=def "
    commands.check_mistakes(
        "generate",
        [
            ([prompt], "--workdir is missing"),
            ([where], "--prompt is missing"),
            ([where, "--prompt="], "prompt 1 is empty"),
            ([where, prompt, f"--prompt={'x' * 63}"], "prompt 2 is 64 tokens long with its BOS"),
            ([f"--workdir={tmp_path}/none", prompt], "there is no checkpoint in"),
            ([where, prompt, "--step=5"], "step=5 is not in"),
            ([where, prompt, "--temperature=-1"], "temperature=-1.0; use 0 or more"),
            ([where, prompt, "--top_p=0"], "top_p=0.0; use above 0"),
            ([where, prompt, "--top_k=many"], "top_k"),
            ([where, prompt, "--min_p=2"], "min_p=2.0; use 0 to 1"),
            ([where, prompt, "--repetition_penalty=0"], "repetition_penalty=0.0; use above 0"),
            ([where, prompt, "--max_tokens=0"], "max_tokens=0; use at least 1"),
            ([where, prompt, "--seed=-1"], "seed=-1"),
            ([where, prompt, "--max_token=3"], "Did you mean: max_tokens"),
        ],
    )
