"""Damage of checkpoint files: always found, the file named, the newest intact step used."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusedkv_jax import data
from fusedkv_jax.training import CheckpointError, Checkpoints, load_model, make_optimizer
from fusedkv_jax.training.checkpointing import manifest
from fusedkv_jax.training.state import abstract_state

FAULTS = ("flip", "zero", "truncate", "grow", "delete", "swap", "add")


def _abstract(config):
    return abstract_state(config.model, make_optimizer(config.optimizer, config.train.steps))


@pytest.fixture(scope="module")
def two_steps(toy, tmp_path_factory):
    """A work directory with checkpoints 1 and 2, whose states are random, and the states."""
    workdir = tmp_path_factory.mktemp("two_steps")
    rng = np.random.default_rng(0)
    states = {
        step: jax.tree.map(
            lambda x: jnp.asarray(100 * rng.standard_normal(x.shape), x.dtype), _abstract(toy)
        )
        for step in (1, 2)
    }
    iterator = data.make_train_iterator(toy.data)
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, iterator, toy, {"eval/loss": 1.0 / step})
    return workdir, states


def _damage(directory, kind, rng) -> str:
    """Does one random harm to one file; returns the file's relative path."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    filled = [path for path in files if path.stat().st_size > 0]
    path = filled[rng.integers(len(filled))]
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    elif kind == "zero":
        start = rng.integers(len(content))
        page = slice(start, start + 4096)
        content[page] = bytes(len(content[page])) if any(content[page]) else b"\1" + content[page]
    elif kind == "truncate":
        content = content[: rng.integers(len(content))]
    elif kind == "grow":
        content += b"\0"
    elif kind == "delete":
        path.unlink()
        return path.relative_to(directory).as_posix()
    elif kind == "swap":
        others = [p for p in filled if p.read_bytes() != bytes(content)]
        other = others[rng.integers(len(others))]
        content, before = other.read_bytes(), bytes(content)
        other.write_bytes(before)
        path.write_bytes(content)
        return " or ".join(sorted(p.relative_to(directory).as_posix() for p in (path, other)))
    else:
        path = path.with_name("added")
    path.write_bytes(bytes(content))
    return path.relative_to(directory).as_posix()


def test_300_random_faults_are_all_found_and_named(two_steps, tmp_path):
    source, _ = two_steps
    rng = np.random.default_rng(0)
    intact = manifest.verify(source / "checkpoints" / "2")
    assert intact.step == 2 and intact.nbytes > 10_000
    for i in range(300):
        kind = FAULTS[i % len(FAULTS)]
        target = tmp_path / str(i)
        shutil.copytree(source / "checkpoints" / "2", target)
        names = _damage(target, kind, rng).split(" or ")
        with pytest.raises(manifest.DamagedCheckpointError) as caught:
            manifest.verify(target)
        message = str(caught.value)
        assert any(name in message for name in (*names, manifest.FILE)), (kind, names, message)
        if manifest.FILE not in names:
            assert any(name in message for name in names)
        shutil.rmtree(target)


@pytest.mark.parametrize("kind", FAULTS)
def test_the_newest_intact_step_is_used(toy, two_steps, tmp_path, kind):
    source, states = two_steps
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    _damage(tmp_path / "checkpoints" / "2", kind, np.random.default_rng(1))
    lines = []
    with Checkpoints(tmp_path, keep=2, report=lines.append) as checkpoints:
        restored = checkpoints.restore(_abstract(toy), data.make_train_iterator(toy.data), toy)
        assert restored is not None and restored[1] == 1
        for x, y in zip(jax.tree.leaves(restored[0]), jax.tree.leaves(states[1]), strict=True):
            np.testing.assert_array_equal(x, y)
        assert checkpoints.latest_step == 1
    assert len(lines) == 1 and "checkpoints/2" in lines[0] and "2.damaged" in lines[0]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2.damaged"]


def test_no_intact_step_is_an_error_and_never_a_silent_restart(toy, two_steps, tmp_path):
    shutil.copytree(two_steps[0], tmp_path, dirs_exist_ok=True)
    for step in (1, 2):
        _damage(tmp_path / "checkpoints" / str(step), "truncate", np.random.default_rng(step))
    with Checkpoints(tmp_path, keep=2, report=lambda line: None) as checkpoints:
        with pytest.raises(CheckpointError, match="no other checkpoint in .* is intact"):
            checkpoints.restore(_abstract(toy), data.make_train_iterator(toy.data), toy)


def test_load_model_names_the_damaged_file(two_steps, tmp_path):
    shutil.copytree(two_steps[0], tmp_path, dirs_exist_ok=True)
    path = max(
        (p for p in (tmp_path / "checkpoints/2/params").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=path.name):
        load_model(tmp_path)
    assert load_model(tmp_path, step=1)[2] == 1


def test_manifest_records_hashes_versions_and_configuration(toy, two_steps):
    directory = two_steps[0] / "checkpoints" / "1"
    found = manifest.read(directory)
    assert found.config == json.loads(json.dumps(toy.to_dict()))
    assert found.metrics == {"eval/loss": 1.0} and found.versions["jax"] == jax.__version__
    for name, (size, digest) in found.files.items():
        content = (directory / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, digest)


def test_the_manifest_is_valid_json_and_the_old_form_is_read(two_steps, tmp_path):
    shutil.copytree(two_steps[0] / "checkpoints" / "1", tmp_path, dirs_exist_ok=True)
    path = tmp_path / manifest.FILE
    fields = json.loads(path.read_bytes())["manifest"]
    body = json.dumps(fields | {"format": 3}, indent=1, sort_keys=True)
    path.write_text(f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n")
    found = manifest.verify(tmp_path)
    assert (found.format, found.step, found.metrics) == (3, 1, {"eval/loss": 1.0})


def test_a_metric_that_is_not_finite_is_null(tmp_path):
    metrics = {"eval/loss": float("nan"), "eval/perplexity": float("inf"), "eval/x": 1.0}
    manifest.write(tmp_path, step=1, config={}, metrics=metrics, data={}, files={})
    assert manifest.read(tmp_path).metrics == {
        "eval/loss": None,
        "eval/perplexity": None,
        "eval/x": 1.0,
    }


def test_a_field_of_a_newer_version_is_named(tmp_path):
    manifest.write(tmp_path, step=1, config={}, metrics={}, data={}, files={})
    path = tmp_path / manifest.FILE
    path.write_bytes(manifest._serialize(json.loads(path.read_bytes())["manifest"] | {"new": 1}))
    with pytest.raises(manifest.CheckpointError, match="unknown field new; restore it with the"):
        manifest.read(tmp_path)
