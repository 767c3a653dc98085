"""Checkpoints: bit-exact round trips, and refusals that name what differs."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fusedkv_jax import data
from fusedkv_jax.training import CheckpointError, Checkpoints, load_model, make_optimizer
from fusedkv_jax.training.checkpointing import directory, manifest
from fusedkv_jax.training.checkpointing.compatibility import check_config
from fusedkv_jax.training.state import abstract_model, abstract_state


def _abstract(config):
    return abstract_state(config.model, make_optimizer(config.optimizer, config.train.steps))


def _scrambled(state, seed):
    """The state with random numbers everywhere, so that no leaf is zero by chance."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(100 * rng.standard_normal(x.shape), x.dtype), state)


def _assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def saved(toy, toy_state, tmp_path):
    """A work directory with one checkpoint of step 7, after three batches, and its state."""
    state = _scrambled(toy_state, 0)
    iterator = data.make_train_iterator(toy.data)
    for _ in range(3):
        next(iterator)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, state, iterator, toy)
        next(iterator)  # goes on while the save runs
    return tmp_path, state


def test_round_trip_is_exact_with_the_place_in_the_data(toy, saved):
    workdir, state = saved
    reference = data.make_train_iterator(toy.data)
    batches = [next(reference) for _ in range(5)]
    iterator = data.make_train_iterator(toy.data)
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.latest_step == 7
        restored = checkpoints.restore(_abstract(toy), iterator, toy)
    assert restored is not None and restored[1] == 7
    _assert_same(restored[0], state)
    for batch in batches[3:]:
        _assert_same(next(iterator), batch)


def test_saved_values_survive_donation(toy, toy_state, tmp_path):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = _scrambled(toy_state, 1)
    wanted = jax.tree.map(np.array, state)
    iterator = data.make_train_iterator(toy.data)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, iterator, toy)
        jax.block_until_ready(overwrite(state))
        checkpoints.wait()
        restored = checkpoints.restore(_abstract(toy), iterator, toy)
    assert restored is not None
    _assert_same(jax.tree.map(np.array, restored[0]), wanted)


def test_bfloat16_parameters_come_back_as_such(toy, tmp_path):
    config = dataclasses.replace(toy, model=toy.model.replace(param_dtype="bfloat16"))
    abstract = _abstract(config)
    state = _scrambled(abstract, 2)
    iterator = data.make_train_iterator(config.data)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, iterator, config)
        checkpoints.wait()
        _assert_same(checkpoints.restore(abstract, iterator, config), (state, 1))


def test_keeps_the_newest_and_saves_a_step_once(toy, toy_state, tmp_path):
    iterator = data.make_train_iterator(toy.data)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(step, toy_state, iterator, toy)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "3"}


def test_keeps_the_best_besides_the_newest(toy, toy_state, tmp_path):
    iterator = data.make_train_iterator(toy.data)
    losses = {1: 5.0, 2: 3.0, 3: None, 4: 4.0, 5: 4.5, 6: None}
    with Checkpoints(tmp_path, keep=1, keep_best=2) as checkpoints:
        for step, loss in losses.items():
            metrics = {} if loss is None else {"eval/loss": loss}
            checkpoints.save(step, toy_state, iterator, toy, metrics)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4", "6"}


def test_a_save_that_fails_is_reported_and_the_next_one_works(toy, toy_state, tmp_path):
    iterator, lines = data.make_train_iterator(toy.data), []
    obstacle = tmp_path / "checkpoints"
    with Checkpoints(tmp_path, keep=1, report=lines.append) as checkpoints:
        obstacle.write_text("a file where the directory should be")
        checkpoints.save(1, toy_state, iterator, toy)
        assert checkpoints.latest_step is None
        obstacle.unlink()
        checkpoints.save(2, toy_state, iterator, toy)
        checkpoints.wait()
        assert checkpoints.latest_step == 2
    assert len(lines) == 1 and "step 1 could not be saved" in lines[0]


def test_a_save_that_fails_halfway_leaves_nothing(toy, toy_state, tmp_path, monkeypatch):
    def full(path):
        assert path.is_dir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "hash_files", full)
    lines = []
    with Checkpoints(tmp_path, keep=1, report=lines.append) as checkpoints:
        checkpoints.save(1, toy_state, data.make_train_iterator(toy.data), toy)
    assert len(lines) == 1 and "No space left on device" in lines[0]
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("stuck", ["1", "1.removed-*"])
def test_an_old_checkpoint_that_cannot_be_removed_fails_no_save(
    toy, toy_state, tmp_path, monkeypatch, stuck
):
    """It can neither be renamed nor, once it is, emptied."""
    iterator, lines, rename = data.make_train_iterator(toy.data), [], os.rename
    remove = directory._remove

    def refuse(path):
        if path.match(stuck):
            raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rename", lambda old, new: (refuse(Path(old)), rename(old, new))[1])
    monkeypatch.setattr(directory, "_remove", lambda path: (refuse(path), remove(path))[1])
    with Checkpoints(tmp_path, keep=1, report=lines.append) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, toy_state, iterator, toy)
            checkpoints.wait()
            assert checkpoints.latest_step == step
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert "3" in left and "2" not in left and len(left) == 2
    said = "is saved, but not all checkpoints before it that .*: Permission denied"
    assert re.search(f"step 2 {said}", lines[0]) and len(lines) == (2 if stuck == "1" else 1)
    monkeypatch.undo()
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # it goes when it can
        checkpoints.save(4, toy_state, iterator, toy)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4"}


# In a process of its own: the limit is the process's, and Orbax leaves threads and coroutines of
# the failed save behind, which would complain in whichever test collects them.
_DISK_FULL_FOR_STEP_1 = """
import json, resource, sys
import jax
import jax.numpy as jnp
from fusedkv_jax import data
from fusedkv_jax.training import Checkpoints, ExperimentConfig, make_optimizer
from fusedkv_jax.training.state import abstract_state

config = ExperimentConfig.from_dict(json.loads(sys.argv[1]))
abstract = abstract_state(config.model, make_optimizer(config.optimizer, config.train.steps))
state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
iterator = data.make_train_iterator(config.data)
before = resource.getrlimit(resource.RLIMIT_FSIZE)
with Checkpoints(sys.argv[2], keep=1, report=print) as checkpoints:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        checkpoints.save(1, state, iterator, config)
        checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoints.save(2, state, iterator, config)
"""


def test_a_disk_that_takes_no_more_is_one_line(toy, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", _DISK_FULL_FOR_STEP_1, json.dumps(toy.to_dict()), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == [
        "warning: step 1 could not be saved and training goes on: File too large"
    ]
    # What Orbax's own threads say on stderr about the failed writes differs from run to run. They
    # may also have written on after the failure; the next run clears that away.
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_what_an_interrupted_save_or_removal_left_is_removed(saved):
    workdir, _ = saved
    directory, mark = workdir / "checkpoints", f"fusedkv_jax-{'0a' * 16}"
    for name in (f"9.unfinished-{mark}", f"9.unfinished-{mark}.orbax-checkpoint-tmp"):
        (directory / name / "params").mkdir(parents=True)
    shutil.copytree(directory / "7", directory / f"3.removed-{mark}")
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.latest_step == 7
    assert [path.name for path in directory.iterdir()] == ["7"]


def test_what_others_put_beside_or_into_checkpoints_is_never_lost(toy, toy_state, saved):
    workdir, _ = saved
    directory = workdir / "checkpoints"
    names = ("notes", "9.unfinished", "3.removed", "5", "7.damaged", "٣", "best/model", "7/mine")
    contents = {directory / name / "text.txt": name for name in names}
    for path, text in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    iterator, lines = data.make_train_iterator(toy.data), []
    with Checkpoints(workdir, keep=1, report=lines.append) as checkpoints:
        with pytest.raises(CheckpointError, match="no other checkpoint"):
            checkpoints.restore(_abstract(toy), iterator, toy)  # 7 is not as it was saved
        for step in (8, 9):  # prunes
            checkpoints.save(step, toy_state, iterator, toy)
    found = sorted(path.read_text() for path in directory.rglob("text.txt"))
    assert found == sorted(names)
    assert (directory / "7.damaged-2" / "manifest.json").exists() and len(lines) == 2


def test_a_file_in_a_checkpoint_that_is_no_longer_kept_survives_it(toy, toy_state, tmp_path):
    iterator = data.make_train_iterator(toy.data)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, toy_state, iterator, toy)
        checkpoints.wait()
        (tmp_path / "checkpoints" / "1" / "notes.txt").write_text("mine")
        checkpoints.save(2, toy_state, iterator, toy)
    kept = [path for path in (tmp_path / "checkpoints").rglob("*") if path.parent.name[0] == "1"]
    assert [(path.name, path.read_text()) for path in kept] == [("notes.txt", "mine")]


def test_relative_workdir(toy, toy_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("runs/a", keep=1) as checkpoints:
        checkpoints.save(1, toy_state, data.make_train_iterator(toy.data), toy)
    assert (tmp_path / "runs/a/checkpoints/1/params").is_dir()


def _refusal(workdir, config) -> str:
    iterator = data.make_train_iterator(config.data)
    with Checkpoints(workdir, keep=2) as checkpoints:
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(_abstract(config), iterator, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_width_names_the_first_parameter_and_both_shapes(toy, saved):
    workdir, _ = saved
    config = dataclasses.replace(toy, model=toy.model.replace(d_ff=48))
    names = _shapes(toy), _shapes(config)
    first = next(name for name in sorted(names[0]) if names[0][name] != names[1][name])
    message = _refusal(workdir, config)
    assert f"params/{first} is float32[{names[0][first]}] there" in message
    assert f"float32[{names[1][first]}] here" in message
    assert "model.d_ff: 32 -> 48" in message and "/checkpoints/7" in message


def _shapes(config) -> dict[str, str]:
    _, params = abstract_model(config.model)
    leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(params))[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): ",".join(map(str, leaf.shape))
        for path, leaf in leaves
    }


def test_another_layout_names_a_parameter_that_is_missing(toy, saved):
    workdir, _ = saved
    config = dataclasses.replace(toy, model=toy.model.replace(layout="mha"))
    message = _refusal(workdir, config)
    assert "params/" in message and "missing" in message and "model.layout" in message


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("model", {"norm_eps": 1e-5}, "model.norm_eps: 1e-06 -> 1e-05"),
        ("data", {"seed": 3}, "data.seed: 0 -> 3"),
        ("data", {"batch_size": 8}, "data.batch_size: 4 -> 8"),
    ],
)
def test_other_settings_with_equal_shapes_are_named(toy, saved, part, changes, named):
    workdir, _ = saved
    changed = dataclasses.replace(getattr(toy, part), **changes)
    assert named in _refusal(workdir, dataclasses.replace(toy, **{part: changed}))


def test_settings_that_change_no_result_may_change(toy, saved):
    workdir, state = saved
    config = dataclasses.replace(
        toy,
        model=toy.model.replace(remat="full", max_length=128),
        data=dataclasses.replace(toy.data, num_threads=0),
        train=dataclasses.replace(toy.train, steps=80, log_every=3),
    )
    iterator = data.make_train_iterator(config.data)
    with Checkpoints(workdir, keep=2) as checkpoints:
        _assert_same(checkpoints.restore(_abstract(config), iterator, config), (state, 7))


def test_load_model_gives_the_saved_parameters_and_config(toy, saved):
    workdir, state = saved
    model, config, step = load_model(workdir)
    assert (config, step) == (toy, 7)
    _assert_same(nnx.state(model, nnx.Param), state.params)


def test_load_model_says_what_is_missing(tmp_path, saved):
    with pytest.raises(CheckpointError, match="no checkpoint in .*nothing; train there first"):
        load_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="step=8 is not in .*, which has 7"):
        load_model(saved[0], step=8)


@pytest.mark.parametrize("names", [("byte", "mine/tokenizer.json"), ("mine", "byte")])
def test_bytes_and_a_tokenizer_do_not_take_each_others_place(toy, tmp_path, names):
    """Recall is made from the configuration, and its examples depend on the tokenizer's size."""
    began, goes_on = (
        dataclasses.replace(toy, data=dataclasses.replace(toy.data, tokenizer=name))
        for name in names
    )
    saved = json.loads(json.dumps(began.to_dict()))
    with pytest.raises(CheckpointError, match=rf"data\.tokenizer: '{names[0]}' -> '{names[1]}'"):
        check_config(tmp_path, saved, goes_on)
    moved = dataclasses.replace(began.data, tokenizer=f"{tmp_path}/moved")  # compared by its hash
    if names[0] != "byte":
        check_config(tmp_path, saved, dataclasses.replace(began, data=moved))


def test_a_setting_newer_than_the_checkpoint_had_its_default(toy, tmp_path):
    saved = json.loads(json.dumps(toy.to_dict()))
    del saved["model"]["logit_softcap"]
    check_config(tmp_path, saved, toy)
    capped = dataclasses.replace(toy, model=dataclasses.replace(toy.model, logit_softcap=30.0))
    with pytest.raises(CheckpointError, match=r"model\.logit_softcap: None -> 30\.0"):
        check_config(tmp_path, saved, capped)
    saved["model"]["of_old"] = 1
    with pytest.raises(CheckpointError, match="of_old"):
        check_config(tmp_path, saved, toy)
