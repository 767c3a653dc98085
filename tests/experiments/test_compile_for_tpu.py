"""`python -m experiments.compile_for_tpu`: its reports and its mistakes."""

import importlib.util
import json
import re

import pytest

from fusedkv_jax import costs, presets
from fusedkv_jax.config import ModelConfig
from tests.experiments import commands

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu"
)

CONFIG = """
from fusedkv_jax import ModelConfig
from fusedkv_jax.data import DataConfig
from fusedkv_jax.sharding import MeshConfig
from fusedkv_jax.training import ExperimentConfig

def get_config():
    return ExperimentConfig(
        name="small",
        model=ModelConfig(vocab_size=512, num_layers=4, d_model=256, num_heads=2, d_ff=512,
                          layout="fusedkv", dtype="bfloat16", remat="full"),
        data=DataConfig(source="none", seq_len=256, batch_size=4),
        mesh=MeshConfig(data=1, fsdp=4),
    )
"""


@needs_libtpu
def test_mistakes_are_one_line():
    slice_ = "--topology=v5e:2x2"
    commands.check_mistakes(
        "compile_for_tpu",
        [
            (["--preset=4b"], "--topology is missing"),
            (["--topology=v9:2x2", "--preset=4b"], "known are v5e:1x1"),
            (["--topology=v5e:3x3", "--preset=4b"], "known are v5e:1x1"),
            ([slice_], "--config is missing"),
            ([slice_, "--preset=4b", "--config=paper_4b"], "give one of them"),
            ([slice_, "--preset=5b"], "unknown preset '5b'"),
            ([slice_, "--preset=4b", "--rows=-4"], "--rows=-4"),
            ([slice_, "--preset=4b", "--rows=0"], "--rows=0"),
            ([slice_, "--preset=4b", "--search", "--trials=0"], "--trials=0"),
            ([slice_, "--preset=4b", "--programs=test"], "choose train, prefill, decode"),
        ],
    )


@needs_libtpu
def test_a_small_model_on_a_small_slice(tmp_path):
    path, data = tmp_path / "small.py", tmp_path / "report.json"
    path.write_text(CONFIG)
    flags = ["--topology=v5e:2x2", f"--config={path}", f"--json={data}", "--length=256"]
    ((code, out, error),) = commands.run("compile_for_tpu", flags)
    assert code == 0, error
    assert out.count(": fits") == 3 and "nothing was run" in out
    document = json.loads(data.read_text())
    assert document["topology"] == "v5e:2x2"
    train, prefill, decode = document["reports"]
    names: dict = {}
    exec(CONFIG, names)
    model: ModelConfig = names["get_config"]().model
    parameters = costs.parameter_count(model)
    # Matrices are split in four; norms and fusion weights are copied.
    assert parameters < train["parts"]["parameters"] < 1.1 * parameters
    assert train["parts"]["optimizer"] == pytest.approx(2 * train["parts"]["parameters"], rel=0.01)
    # Fusion weights stay in float32.
    assert 2 * parameters < prefill["parts"]["parameters"] < 2.01 * parameters
    assert decode["parts"]["cache"] >= costs.cache_bytes(model, 1, 256)
    for one in document["reports"]:
        assert one["peak"] < one["capacity"] == int(15.75 * 2**30)
        held = sum(one["parts"].values()) + one["temporaries"] + one["code"]
        assert one["peak"] == held
    # The forward pass is repeated (remat), the products of the head are not.
    flops = 4 * 256 * costs.train_flops_per_token(model, 256) / 4
    assert flops < train["flops"] < 1.6 * flops
    assert train["kernels"]["tile_forward"] == 2 * train["kernels"]["tile_backward"] == 8
    assert train["collectives"] and not prefill["collectives"]


_PLAIN = ["--config.mesh.fsdp=2", "--config.mesh.data=2", "--config.train.grad_accumulation=1"]


@needs_libtpu
def test_what_does_not_fit_says_how_many_bytes_are_missing():
    flags = ["--topology=v5e:2x2", "--preset=4b", "--programs=train", *_PLAIN]
    ((code, _, error),) = commands.run("compile_for_tpu", flags)
    assert code == 2 and error.startswith("error: the train program does not fit v5e:2x2")
    assert error.count("\n") == 1 and "train.grad_accumulation=" in error
    needed, missing = (
        int(re.findall(pattern, error)[0].replace(",", ""))
        for pattern in (r"needs ([\d,]+) bytes", r"so ([\d,]+) bytes .* are missing")
    )
    parameters = 4 * costs.parameter_count(presets.get("4b", "fusedkv"))
    assert missing == needed - int(15.75 * 2**30)
    assert needed > 3 * parameters / 4  # with the optimizer's state, on four chips
