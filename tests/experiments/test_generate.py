"""The generate binary: what it writes, and its mistakes."""

import io
import json
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import generate
from experiments.common import chat
from fusedkv_jax import SamplingParams
from fusedkv_jax.data import tokenizers
from fusedkv_jax.training import load_model
from tests.experiments import commands

RATES = (
    r"prefill \d+ tokens, \d+ tokens/s; decode \d+ tokens, [\d.]+ tokens/s"
    r"(; [\d.]+ s compiling beside)?\n"
)


@pytest.fixture
def workdir(finished_run):
    """Directory of a finished run; its context is 64 tokens."""
    return finished_run


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
    ((code, first, error),) = commands.run("generate", greedily)
    assert code == 0 and re.fullmatch(RATES, error), error
    again, three, three_again, four = commands.run_here(
        "generate",
        [*drawn, "--top_k=1"],  # greedy by another name
        [*drawn, "--seed=3"],
        [*drawn, "--seed=3"],
        [*drawn, "--seed=4"],
    )
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


def test_prompt_files_and_formats(workdir, tmp_path):
    lines, strings = tmp_path / "lines.txt", tmp_path / "strings.jsonl"
    lines.write_bytes("\ufeffdef \r\nreturn cache\r\n".encode())  # as Windows writes them
    strings.write_text('"def "\n"return cache"\n', encoding="utf-8")
    common = [f"--workdir={workdir}", "--max_tokens=8", "--temperature=0", "--ignore_eos"]
    prompts = ["--prompt=def ", "--prompt=return cache"]
    texts = commands.run_here(
        "generate",
        [*common, *prompts],
        [*common, f"--prompt_file={lines}"],
        [*common, f"--prompt_file={strings}", "--max_num_batched_tokens=3"],
        [*common, *prompts, "--format=json", "--logprobs=1", "--prompt_logprobs=0"],
        [*common[:2], *common[3:], *prompts, "--beam_width=1"],
        [*common[:2], *common[3:], *prompts, "--beam_width=3", "--n=2"],
    )
    assert texts[0] == texts[1] == texts[2] == texts[4]
    assert texts[5].count("=== ") == 4 and "prompt 2 of 2, output 2: 8 tokens" in texts[5]
    for line, prompt in zip(texts[3].splitlines(), ("def ", "return cache"), strict=True):
        found = json.loads(line)
        assert found["prompt"] == prompt and f"{prompt}{found['outputs'][0]['text']}" in texts[0]
        assert len(found["outputs"][0]["logprobs"]) == 8
        assert found["prompt_logprobs"][0] is None
        assert len(found["prompt_logprobs"]) == 1 + len(prompt)


@pytest.mark.slow
def test_same_text_on_a_mesh(workdir, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    common = [f"--workdir={workdir}", "--max_tokens=8", "--temperature=0", "--prompt=def find("]
    outputs = commands.run(
        "generate",
        common,
        [*common, "--mesh.tensor=2"],
        [*common, "--mesh.data=1", "--mesh.context=4", "--prefill_parts=balanced"],
        [*common, "--mesh.context=2", "--mesh.devices=2", "--prefill_parts=3,1"],
    )
    assert [code for code, _, _ in outputs] == [0] * 4, outputs
    assert len({text for _, text, _ in outputs}) == 1


def test_conversation(workdir, tmp_path, monkeypatch, capsys):
    """Every answer continues the whole conversation; what is wrong with a message is printed."""
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:")
    typed = ["hi", "y" * 99, "ho", "/reset", "hi", "", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    values = {"chat_template": str(template), "system": "s"}
    monkeypatch.setattr(chat, "FLAGS", types.SimpleNamespace(**values))
    model, _, _ = load_model(workdir)
    tokenizer = tokenizers.load("byte")
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    chat.converse(model, tokenizer, params, {})
    out, error = capsys.readouterr()

    def answer(prompt):
        tokens = greedy(model, list(prompt.encode()), 6)
        return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")

    first = answer("s:s;u:hi;a:")
    second = answer(f"s:s;u:hi;a:{first};u:ho;a:")
    assert out == f"{first}\n{second}\n{first}\n"
    assert error.count("decode 6 tokens") == 3
    assert error.count("error: prompt 0 has") == 1


def test_mistakes(workdir, tmp_path):
    where, prompt = f"--workdir={workdir}", "--prompt=def "
    latin, line = tmp_path / "latin.txt", tmp_path / "line.jsonl"
    latin.write_bytes("größe".encode("latin-1"))
    line.write_text('"a"\n{"prompt": "b"}\n')
    commands.check_mistakes(
        "generate",
        [
            ([prompt], "--workdir is missing"),
            ([where], "--prompt is missing"),
            ([where, "--prompt="], "prompt 1 is empty"),
            (
                [where, prompt, f"--prompt={'x' * 63}"],
                "prompt 2 has 64 tokens",
            ),
            ([f"--workdir={tmp_path}/none", prompt], "there is no checkpoint in"),
            ([where, prompt, "--step=5"], "step=5 is not in"),
            ([where, prompt, "--temperature=-1"], "temperature=-1.0; use 0 or more"),
            ([where, prompt, "--top_p=0"], "top_p=0.0; use above 0"),
            ([where, prompt, "--top_k=many"], "top_k"),
            ([where, prompt, "--min_p=2"], "min_p=2.0; use 0 to 1"),
            ([where, prompt, "--repetition_penalty=0"], "repetition_penalty=0.0; use above 0"),
            ([where, prompt, "--max_tokens=0"], "max_tokens=0; use at least 1"),
            ([where, prompt, "--seed=-1"], "seed=-1"),
            ([where, f"--prompt_file={tmp_path}/none"], "no such file"),
            ([where, f"--prompt_file={latin}"], "not UTF-8: byte 0xf6 at offset 2; convert"),
            ([where, f"--prompt_file={line}"], "line 2 is not a JSON string"),
            ([where, prompt, "--n=2", "--temperature=0"], "--n=2; use 1 with --temperature=0"),
            ([where, prompt, "--stop="], "--stop= is empty; give it a value"),
            ([where, prompt, "--logit_bias=a:1"], "--logit_bias='a:1'; write ID:BIAS"),
            ([where, prompt, "--logit_bias=3:200"], "logit_bias={3: 200.0}; use"),
            ([where, prompt, "--stop_token_ids=999"], "stop_token_ids token id 999"),
            ([where, prompt, "--min_tokens=500"], "use at most --max_tokens=128"),
            ([where, prompt, "--beam_width=2", "--n=3"], "--n=3; use 1 to --beam_width=2"),
            ([where, prompt, "--batch_size=0"], "batch_size=0; use at least 1"),
            ([where, prompt, "--mesh.tensr=2"], "field --mesh.tensr; did you mean --mesh.tensor"),
            ([where, prompt, "--mesh.devices=99"], "mesh.devices=99, and there are"),
            (
                [where, prompt, "--prefill_parts=equal"],
                "--prefill_parts has no effect without --mesh",
            ),
            ([where, "--chat"], "has no chat template; give --chat_template"),
            ([where, prompt, "--max_token=3"], "did you mean --max_tokens"),
        ],
    )
