"""Model folders: damage, and names that lead elsewhere."""

import json
import re

import numpy as np
import pytest

from fusedkv_jax.interop import (
    FolderError,
    config_to_huggingface,
    load_huggingface,
    save_huggingface,
)
from fusedkv_jax.interop.safetensors_folder import checked_path
from tests.oracles.decoder import build, draw, small_config

CONFIG = small_config("mha", num_layers=1)


@pytest.fixture(scope="module")
def model():
    return build(CONFIG, draw(CONFIG))


@pytest.fixture
def folder(model, tmp_path):
    save_huggingface(model, tmp_path / "sharded", max_shard_bytes=3000)
    return tmp_path / "sharded"


@pytest.fixture
def index(folder):
    """Path and content of the index of shards."""
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def assert_refused(folder, message):
    with pytest.raises(FolderError, match=message) as caught:
        load_huggingface(folder)
    assert "\n" not in str(caught.value)


def test_one_file_goes_before_the_index(folder, tmp_path):
    """transformers, too, reads model.safetensors where there are both."""
    other = build(CONFIG, draw(CONFIG, seed=1))
    save_huggingface(other, tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").rename(folder / "model.safetensors")
    read = load_huggingface(folder)
    np.testing.assert_array_equal(read.embedding[...], other.embedding[...])


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b"]
)
def test_names_that_leave_the_folder_are_refused(folder, index, name):
    path, content = index
    (folder.parent / "outside.safetensors").write_bytes(b"")
    path.write_text(json.dumps({"weight_map": dict.fromkeys(content["weight_map"], name)}))
    assert_refused(folder, re.escape(repr(name)) + " leads out of the folder")


def test_symbolic_links_are_refused(folder):
    shard = min(folder.glob("*.safetensors"))
    shard.rename(folder.parent / "moved")
    assert_refused(folder, f"{shard.name} does not exist")
    shard.symlink_to(folder.parent / "moved")
    assert_refused(folder, f"{shard.name} is a symbolic link")


def test_links_of_the_hubs_cache_are_followed(folder):
    """MODEL/snapshots/REVISION holds links into MODEL/blobs, and no others are followed."""
    cache = folder.parent / "models--org--name"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load_huggingface(snapshot).config == CONFIG
    shard = min(snapshot.glob("*.safetensors"))
    target = shard.resolve()
    shard.unlink()
    (folder.parent / "outside").write_bytes(target.read_bytes())
    (snapshot / "within").mkdir()
    (snapshot / "within" / "one").symlink_to(f"../../../blobs/{target.name}")
    assert checked_path(snapshot / "within", "one").resolve() == target
    (snapshot / "within" / "two").symlink_to("../../../../outside")
    with pytest.raises(FolderError, match="two is a symbolic link that leads out"):
        checked_path(snapshot / "within", "two")
    shard.symlink_to("../../../outside")
    assert_refused(snapshot, f"{shard.name} is a symbolic link")


def test_broken_indexes_are_named(folder, index):
    path, content = index
    shard = min(content["weight_map"].values())
    path.write_text(json.dumps({"weight_map": dict.fromkeys(content["weight_map"], shard)}))
    assert_refused(folder, f"{shard}: tensor ")
    for text in ('{"weight_map": {"a": 3}}', "{}"):
        path.write_text(text)
        assert_refused(folder, "no weight_map of file names")
    path.write_text("{")
    assert_refused(folder, "index.json is not valid JSON")
    path.write_text("[]")
    assert_refused(folder, "index.json holds no JSON object")


def test_truncated_shards_are_named(folder):
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-40])
    assert_refused(folder, f"{shard.name} is not a readable safetensors file")


def test_what_is_missing_is_named(tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere does not exist; name a model folder")
    (tmp_path / "notes.md").write_text("no model")
    assert_refused(tmp_path / "notes.md", "notes.md is a file; name a model folder")
    (tmp_path / "config.json").write_text(json.dumps(config_to_huggingface(CONFIG)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    assert_refused(tmp_path, "only safetensors are read")


def test_nothing_is_overwritten(model, tmp_path):
    (tmp_path / "file").write_text("keep me")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(FolderError, match="not an empty folder"):
            save_huggingface(model, path)
    assert (tmp_path / "file").read_text() == "keep me"
    assert len(list(tmp_path.iterdir())) == 1
