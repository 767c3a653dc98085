"""--model, --init_from and convert: a tiny model with a tokenizer goes through every program."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
from experiments import convert
from experiments.common import models
from fusedkv_jax.interop import load_huggingface, save_huggingface, uptrain
from fusedkv_jax.training import load_model
from tests.data import single_letters
from tests.experiments import commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder whose tokenizer knows single letters."""
    root = tmp_path_factory.mktemp("model")
    single_letters.save(root)
    (root / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    (root / "additional_chat_templates").mkdir()
    (root / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    config = fkv.ModelConfig(
        vocab_size=len(single_letters.WORDS),
        num_layers=2,
        d_model=16,
        num_heads=2,
        d_ff=16,
        qk_norm=False,
        max_length=64,
        tie_embeddings=True,
    )
    save_huggingface(fkv.Decoder(config, rngs=nnx.Rngs(0)), root / "m", tokenizer=root)
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 20)
    return root / "m"


def test_programs_take_a_folder(folder, tmp_path):
    model, text = f"--model={folder}", f"--source={folder.parent / 'text.txt'}"
    generate = [model, "--prompt=the fox", "--temperature=0", "--max_tokens=4", "--format=json"]
    (written, missing, both, none) = commands.run(
        "generate",
        generate,
        ["--model=/nowhere", "--prompt=a"],
        [model, "--workdir=x", "--prompt=a"],
        ["--prompt=a"],
    )
    assert written[0] == 0, written
    assert len(json.loads(written[1])["outputs"][0]["token_ids"]) == 4
    for code, _, error in (missing, both, none):
        assert code == 2 and len(error.splitlines()) == 1
    (evaluated,) = commands.run_here("evaluate", [model, text, "--max_batches=1"])
    assert json.loads(evaluated.splitlines()[-1])["loss"] > 0
    with pytest.raises(commands.Refused, match="--source is missing"):
        commands.run_here("evaluate", [model])
    with pytest.raises(commands.Refused, match="ids up to 257, outside the model's vocabulary"):
        commands.run_here("evaluate", [model, text, "--tokenizer=byte"])


def test_a_folder_becomes_a_run_and_a_folder_again(folder, tmp_path):
    run, again = str(tmp_path / "run"), str(tmp_path / "again")
    (there,) = commands.run_here("convert", [f"--model={folder}", f"--output={run}", "--check"])
    report = json.loads(there.splitlines()[-1])
    assert [row["same text"] for row in report["check"]][:2] == [True, True]
    assert report["check"][1]["largest logit difference"] == 0
    commands.run_here("convert", [f"--workdir={run}", f"--output={again}"])
    with pytest.raises(commands.Refused, match="is not empty; name a new folder"):
        commands.run_here("convert", [f"--model={folder}", f"--output={run}"])
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "model.safetensors",
        "config.json",
    ):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_model_card_names_all_sources_of_a_mixture(tmp_path):
    config = fkv.ModelConfig(vocab_size=258, num_layers=2, d_model=16, num_heads=2, d_ff=16)
    own = models.experiment("a", config, "byte")
    for source, named in (
        ("/home/me/web.jsonl,3;/home/me/code,1", "web.jsonl (75%), code (25%)"),
        ("/home/me/web.jsonl", "web.jsonl"),
    ):
        data = dataclasses.replace(own.data, source=source, seq_len=32, batch_size=2)
        run = dataclasses.replace(own, data=data)
        facts = convert._facts(models.Loaded(None, run, 10, str(tmp_path)))
        assert "ids 0 to 255 are the bytes" in facts.pop("tokenizer")
        assert facts == {"data": named, "tokens trained on": "640"}


def test_a_folder_without_a_tokenizer_says_which_flag_names_one(tmp_path):
    config = fkv.ModelConfig(vocab_size=258, num_layers=2, d_model=16, num_heads=2, d_ff=16)
    fkv.interop.save_huggingface(fkv.Decoder(config, rngs=nnx.Rngs(0)), tmp_path / "m")
    (tmp_path / "text.txt").write_text("text\n")
    text = tmp_path / "text.txt"
    why = "the folder has no tokenizer.json; name one, or byte"
    for program, flag, arguments in (
        ("generate", "tokenizer", [f"--model={tmp_path / 'm'}", "--prompt=a"]),
        (
            "train",
            "config.data.tokenizer",
            [
                *("--config=demo", f"--init_from={tmp_path / 'm'}", f"--workdir={tmp_path / 'r'}"),
                f"--config.data.source={text}",
            ],
        ),
    ):
        ((code, _, error),) = commands.run(program, arguments)
        assert code == 2 and f"--{flag}={tmp_path / 'm'}: {why}" in error, error


def test_training_starts_from_a_folder(folder, tmp_path):
    arguments = [
        "--config=demo",
        f"--init_from={folder}",
        f"--config.data.source={folder.parent / 'text.txt'}",
        "--config.data.seq_len=32",
        "--config.data.batch_size=2",
        "--config.data.holdout_fraction=0.0",
        "--config.train.eval_batches=0",
        "--config.train.steps=1",
        "--config.optimizer.learning_rate=1e-30",
        "--config.mesh.devices=1",
    ]
    where = f"--workdir={tmp_path / 'run'}"
    commands.run_here("train", [*arguments, where, "--config.model.layout=cla"])
    wrong = [*arguments, f"--workdir={tmp_path / 'other'}", "--config.model.num_heads=4"]
    with pytest.raises(commands.Refused, match="--config.model.num_heads=4 does not fit"):
        commands.run_here("train", wrong)
    model, config, _ = load_model(tmp_path / "run")
    expected = load_huggingface(folder, layout="cla")
    assert config.model == expected.config
    pair = (nnx.to_flat_state(nnx.state(each)) for each in (model, expected))
    for ours, theirs in zip(*pair, strict=True):
        assert abs(ours[1][...] - theirs[1][...]).max() < 1e-6, ours[0]


@pytest.mark.parametrize("window", [None, 8])
def test_a_run_goes_on_without_the_model_that_it_started_from(folder, tmp_path, window):
    start, run = tmp_path / "start", tmp_path / "run"
    if window is None:
        shutil.copytree(folder, start)
    else:
        changes = dict(layout="0s8_1s8", tie_embeddings=False)
        model = fkv.Decoder(load_huggingface(folder).config.replace(**changes), rngs=nnx.Rngs(0))
        save_huggingface(model, start, tokenizer=folder)
    arguments = [
        "--config=demo",
        f"--init_from={start}",
        f"--config.data.source={folder.parent / 'text.txt'}",
        "--config.data.seq_len=32",
        "--config.data.batch_size=2",
        "--config.data.holdout_fraction=0.0",
        "--config.train.eval_batches=0",
        "--config.mesh.devices=1",
        "--config.model.layout=cla",
    ]
    here = [*arguments, f"--workdir={run}"]
    commands.run_here("train", [*here, "--config.train.steps=1"])
    shutil.rmtree(start)
    commands.run_here("train", [*here, "--config.train.steps=2"])
    assert load_model(run)[2] == 2
    # Its own copy of the tokenizer is what another run begins with.
    assert models.Start(str(run), tmp_path).tokenizer == str(run / "tokenizer")
    if window is None:
        next_run = [arguments[0], f"--init_from={run}", *arguments[2:], "--config.train.steps=1"]
        commands.run_here("train", [*next_run, f"--workdir={tmp_path / 'next'}"])
    with pytest.raises(commands.Refused, match="start"):
        commands.run_here("train", [*arguments, f"--workdir={tmp_path / 'other'}"])
    with pytest.raises(commands.Refused, match="--teacher is missing; --init_from=.* no longer"):
        commands.run_here("train", [*here, "--config.distillation.logits=1"])
    with pytest.raises(commands.Refused, match="--config.model.layout: .* shares keys and values"):
        commands.run_here("train", [*here[:-2], here[-1], "--config.model.layout=mha"])


def test_a_conversion_is_fitted_and_learns_from_its_original(folder, tmp_path):
    run = tmp_path / "run"
    arguments = [
        "--config=demo",
        f"--init_from={folder}",
        f"--config.data.source={folder.parent / 'text.txt'}",
        "--config.data.seq_len=32",
        "--config.data.batch_size=2",
        "--config.data.holdout_fraction=0.0",
        "--config.train.eval_batches=0",
        "--config.train.steps=2",
        "--config.optimizer.learning_rate=1e-30",
        "--config.mesh.devices=1",
        "--config.model.layout=yoco",
        f"--workdir={run}",
    ]
    learns = "--config.distillation.logits=1"
    fitted = [*arguments, "--fit_tokens=256", learns, "--config.distillation.hidden=1"]
    commands.run_here("train", fitted)
    commands.run_here("train", [*arguments, learns, f"--teacher={folder}"])
    other = shutil.copytree(folder, tmp_path / "other")
    swapped = (other / "tokenizer.json").read_text().replace('"a":', '"?":').replace('"b":', '"a":')
    (other / "tokenizer.json").write_text(swapped.replace('"?":', '"b":'))
    with pytest.raises(commands.Refused, match="--teacher=.*other has another tokenizer"):
        commands.run_here("train", [*fitted, f"--teacher={other}"])
    with pytest.raises(commands.Refused, match="--teacher goes with --config.distillation"):
        commands.run_here("train", [*arguments, f"--teacher={folder}"])
    with pytest.raises(commands.Refused, match="--teacher is missing"):
        commands.run_here("train", ["--config=demo", f"--workdir={tmp_path / 'other'}", learns])
    model, config, _ = load_model(run)
    tokens = models.training_tokens(config.data, 256)
    assert tokens.shape == (8, 32)
    expected = uptrain.fit(load_huggingface(folder), "yoco", tokens)
    np.testing.assert_allclose(model(tokens), expected(tokens), atol=1e-3)


def test_losses_of_conversions_are_tabulated(folder, tmp_path):
    text = tmp_path / "text.jsonl"
    lines = [{"text": f"document {'abcdefghij'[i]} of the text.\n" * 4} for i in range(10)]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [
        f"--init_from={folder}",
        f"--config.data.source={text}",
        "--config.data.seq_len=16",
        "--config.data.batch_size=2",
        "--config.data.holdout_fraction=0.5",
        "--config.train.eval_batches=1",
        "--config.train.eval_every=1",
        "--config.mesh.devices=1",
        f"--workdir={tmp_path}",
        "--layouts=yoco",
        "--fit_tokens=64",
    ]
    (made,) = commands.run_here(
        "uptrain", [*arguments, "--objectives=stages", "--config.train.steps=2"]
    )
    with pytest.raises(commands.Refused, match="--objectives=other; choose text"):
        commands.run_here("uptrain", [*arguments, "--objectives=other"])
    with pytest.raises(commands.Refused, match="steps=1 are fewer than the parts of --obj"):
        commands.run_here("uptrain", [*arguments, "--config.train.steps=1"])
    with pytest.raises(commands.Refused, match="--layouts=svformer: layer 1: only layers that"):
        commands.run_here("uptrain", [*arguments[:-2], "--layouts=yoco,svformer"])
    with pytest.raises(commands.Refused, match="another setting, name: .* to 64 tokens' -> "):
        commands.run_here("uptrain", [*arguments[:-1], "--fit_tokens=32"])
    (again,) = commands.run_here(
        "uptrain", [*arguments, "--objectives=none", f"--output={tmp_path / 'fit'}"]
    )
    results, fit = (json.loads(lines.splitlines()[-1]) for lines in (made, again))
    (row,) = results["rows"]
    assert fit["train_tokens"] == 0 and fit["rows"] == [row | {"curves": {}, "stages": {}}]
    assert not (tmp_path / "fit.png").exists()
    curves, stages = row["curves"], row["stages"]
    assert [tokens for tokens, _ in curves["stages"]] == [0, 32, 64]
    assert list(stages["stages"]) == ["hidden states", "logits"]
    assert list(stages["stages"].values()) == [loss for _, loss in curves["stages"][1:]]
    assert curves["stages"][0][1] == row["fitted"] != curves["stages"][1][1]
    assert row["cache_bytes_per_token"] * 2 == results["original"]["cache_bytes_per_token"]
    assert "| yoco | 50% |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.png").stat().st_size > 1000
