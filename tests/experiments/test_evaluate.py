"""The evaluate binary: suites on a model of a few steps, and mistakes in the command."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from experiments.common import models
from experiments.configs import recall
from experiments.suites import longcontext
from experiments.suites.longcontext_methods import defaults, methods, refusal
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.evaluation.longcontext_cases import LongContextSettings, cases
from fusedkv_jax.model import Decoder
from tests.experiments.commands import check_mistakes, run


@pytest.fixture
def workdir(finished_run):
    return finished_run


@pytest.mark.slow
@pytest.mark.usefixtures("share_compiled_programs")
def test_suites_on_a_toy(workdir, tmp_path):
    name = f"--workdir={workdir}"
    report = ["--suite=longcontext", name, "--length=64", "--examples=2", "--tasks=text"]
    compared = ["snapkv:budget=16,window=4", "streaming_llm:budget=16"]
    dtypes = ["--cache_dtype=float32", "--cache_dtype=int8"]
    found = run(
        "evaluate",
        [*report, *(f"--compression={c}" for c in compared), dtypes[1], f"--output={tmp_path}"],
        ["--suite=length", name, "--length=32", "--examples=2", *dtypes],
    )
    assert all(code == 0 for code, _, _ in found), found
    results = json.loads(found[0][1].splitlines()[-1])
    assert results == json.loads((tmp_path / "longcontext.json").read_text())
    assert (tmp_path / "longcontext.png").read_bytes()[:4] == b"\x89PNG"
    whole, snap, streaming = results["rows"]
    assert (whole["method"], whole["kl"], whole["top1"], whole["bytes_ratio"]) == (
        "whole cache",
        0,
        1,
        1,
    )
    # 16 tokens and room for what follows; 8 + 4 bytes for 8 channels instead of 32.
    score = snap["tasks"]["text"]
    assert snap["method"] == "snapkv:budget=16,window=4 int8"
    assert score["cache_bytes"] < whole["tasks"]["text"]["cache_bytes"] * 12 / 32
    assert 0 < snap["kl"] < 1 and 0 < streaming["kl"] < 1
    table = (tmp_path / "longcontext.md").read_text()
    assert f"| {snap['method']} | {snap['bytes_ratio']:.3f} |" in table

    length = json.loads(found[1][1].splitlines()[-1])
    exact, small = length["rows"]
    assert list(exact["by_position"]) == [f"{i}-{i + 4}" for i in range(0, 31, 4)][:7] + ["28-31"]
    assert small["perplexity"] == pytest.approx(exact["perplexity"], rel=0.005)
    assert small["perplexity"] != exact["perplexity"]


@pytest.mark.usefixtures("share_compiled_programs")
def test_mistakes(workdir, tmp_path):
    long = ["--suite=longcontext", f"--workdir={workdir}"]
    check_mistakes(
        "evaluate",
        [
            ([], "--workdir is missing"),
            (["--workdir=/nothing"], "there is no checkpoint in /nothing"),
            (["--suite=longcontexts", f"--workdir={workdir}"], "longcontext"),
            ([*long, "--compression=snapvk"], "did you mean snapkv"),
            ([*long, "--compression=snapkv:budge=3"], "did you mean budget"),
            ([*long, "--compression=snapkv:budget=0"], "budget=0"),
            ([*long, "--cache_dtype=int9"], "did you mean int8"),
            ([*long, "--tasks=single_neddle"], "did you mean single_needle"),
            ([*long, "--tasks=niah_singel_1"], "did you mean niah_single_1"),
            ([*long, "--tasks=ruler"], "task niah_single_2 needs --essays"),
            ([*long, "--tasks=qa_1", "--squad=/nothing"], "no such file or folder '/nothing'"),
            ([*long, "--model=/nothing"], "--workdir and --model are both given"),
            ([*long, "--tasks=single_needle", "--length=65"], "length=65; use 2 to the model's"),
            ([*long, "--tasks=kv_recall", "--length=32"], "length=32 is too short for kv_recall"),
            ([*long, "--examples=900", "--tasks=text"], "use fewer or shorter examples"),
            (
                [*long, "--compression=minicache", "--tasks=text", "--examples=2"],
                "minicache serves no model",
            ),
        ],
    )


def test_runs_go_by_their_layouts_and_models_of_others_by_their_names():
    config, sizes = recall.get_config(), {"d_model": 16, "num_heads": 2, "d_ff": 16}
    small = config.model.replace(layout="fusedkv_lite", **sizes)
    config = dataclasses.replace(config, model=small)
    loaded = models.Loaded(Decoder(config.model, rngs=nnx.Rngs(0)), config, None, "x.gguf")
    settings = LongContextSettings(tasks=("single_needle",), length=96, examples=1)
    for is_run, name in ((True, "fusedkv_lite"), (False, "recall")):
        place = longcontext.Source(loaded.where, config, lambda: loaded, is_run)
        results = longcontext.run([place], methods(["none"], []), settings)
        assert [*results["models"]] == [row["layout"] for row in results["rows"]] == [name]


def test_recall_is_asked_in_the_tokens_that_it_was_learned_in():
    """They are as many as the tokenizer has; the model may have more."""
    config = recall.get_config()
    model = dataclasses.replace(config.model, vocab_size=320)
    settings = LongContextSettings(tasks=("kv_recall",), length=64, examples=2)
    found, wider = (
        cases(each, settings)[0].parts.prompts
        for each in (config, dataclasses.replace(config, model=model))
    )
    np.testing.assert_array_equal(found, wider)


def test_methods_and_who_can_use_them():
    chosen = methods(["snapkv:budget=4", "h2o"], ["int8", "float32"])
    assert [method.name for method in chosen] == [
        "whole cache",
        "snapkv:budget=4 int8",
        "snapkv:budget=4 float32",
        "h2o int8",
        "h2o float32",
    ]
    assert [method.name for method in methods([], ["int8"])] == ["whole cache", "int8"]
    # Short lengths have fewer budgets, and each one is allowed.
    assert [len(defaults(length)) for length in (2, 9, 33, 512)] == [15, 20, 25, 25]
    config = ModelConfig(vocab_size=64, num_layers=4, d_model=16, num_heads=2, d_ff=16)
    usable = {method.name for method in defaults(512) if not refusal(method, config)}
    assert usable == {method.name for method in defaults(512)}
    shared = config.replace(layout="fusedkv")
    refused = {method.name.split(":")[0] for method in defaults(512) if refusal(method, shared)}
    assert refused == {"pyramidinfer", "minicache", "double_sparsity"}
