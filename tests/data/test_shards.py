"""Shards give back what was written, and refuse what was not written for them."""

import json

import numpy as np
import pytest

from fusedkv_jax.data import DataConfig, load_corpus, shards, tokenizers


class OtherTokenizer(tokenizers.ByteTokenizer):
    """Has another fingerprint."""

    name = "other.json"
    fingerprint = "f" * 64


DOCUMENTS = [np.arange(1, 2 + i) * 13 % 258 for i in range(1, 8)]
NUM_BYTES = [10 * i for i in range(1, 8)]


@pytest.fixture(autouse=True)
def short_records(monkeypatch):
    """Small enough that the documents below take one to three records."""
    monkeypatch.setattr(shards, "IDS_PER_RECORD", 3)


@pytest.fixture
def folder(tmp_path):
    dtype = shards.token_dtype(258)
    entries = []
    for split, count, chosen in (("train", 3, slice(0, 5)), ("heldout", 1, slice(5, 7))):
        paths = [tmp_path / shards.shard_name(split, i, count) for i in range(count)]
        writers = [shards.ShardWriter(path, dtype) for path in paths]
        for i, (ids, num_bytes) in enumerate(
            zip(DOCUMENTS[chosen], NUM_BYTES[chosen], strict=True)
        ):
            writers[i % count].add(ids, num_bytes)
        for path, writer in zip(paths, writers, strict=True):
            assert not shards.is_whole(path) and not path.exists()
            writer.close()
            assert shards.is_whole(path)
            entries.append({"file": path.name, "split": split})
    tokenizer = {"name": "byte", "fingerprint": tokenizers.load("byte").fingerprint}
    metadata = {
        "tokenizer": tokenizer,
        "dtype": dtype.str,
        "ids_per_record": shards.IDS_PER_RECORD,
        "shards": entries,
    }
    shards.write_metadata(tmp_path, metadata)
    return tmp_path


def open_folder(folder, tokenizer=None, limit=None):
    files = sorted(folder.glob("*.arrayrecord"))
    return shards.open_splits(files, tokenizer or tokenizers.load("byte"), limit)


def test_round_trip(folder):
    train, heldout = open_folder(folder)
    # Documents go round the shards: 0 3 | 1 4 | 2.
    for position, original in enumerate([0, 3, 1, 4, 2]):
        np.testing.assert_array_equal(train.read(position), DOCUMENTS[original])
        assert train.lengths[position] == len(DOCUMENTS[original]) - 1
        assert train.num_bytes[position] == NUM_BYTES[original]
    np.testing.assert_array_equal(heldout.read(1), DOCUMENTS[6])


def test_parts_of_documents(folder):
    _, heldout = open_folder(folder)
    document = DOCUMENTS[6]
    for start in range(len(document)):
        for stop in range(start + 1, len(document) + 1):
            np.testing.assert_array_equal(heldout.read(1, start, stop), document[start:stop])


def test_some_of_the_shards_and_a_limit(folder):
    files = [folder / shards.shard_name("train", 1, 3)]
    train, heldout = shards.open_splits(files, tokenizers.load("byte"), None)
    assert len(train.lengths) == 2 and len(heldout.lengths) == 0
    np.testing.assert_array_equal(train.read(0), DOCUMENTS[1])
    train, heldout = open_folder(folder, limit=1)
    assert len(train.lengths) == 1 and len(heldout.lengths) == 1


def test_a_folder_without_some_of_its_shards(folder):
    settings = {"seq_len": 8, "batch_size": 1}
    whole = DataConfig(source=str(folder), **settings)
    assert len(load_corpus(whole).train.lengths) == 5
    for i in (0, 2):
        (folder / shards.shard_name("train", i, 3)).unlink()
    problem = (
        f"{folder}: 2 of 4 shards that metadata.json lists are missing: train-00000-of-00003."
        "arrayrecord, train-00002-of-00003.arrayrecord; copy them, or name a glob to read a part"
    )
    mixture = DataConfig(source=f"{folder}/*.arrayrecord,1;{folder},1", **settings)
    for config in (whole, mixture):
        with pytest.raises(ValueError) as error:
            load_corpus(config)
        assert str(error.value) == problem
    parts = {"*.arrayrecord": (2, 2), "train-00001-of-00003.arrayrecord": (2, 0)}
    for part, counts in parts.items():
        corpus = load_corpus(DataConfig(source=f"{folder}/{part}", **settings))
        assert (len(corpus.train.lengths), len(corpus.heldout.lengths)) == counts


def test_many_missing_shards_are_counted(folder):
    path = folder / shards.METADATA
    more = [{"file": shards.shard_name("train", i, 9), "split": "train"} for i in range(9)]
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | {"shards": metadata["shards"] + more}))
    with pytest.raises(ValueError, match=r"9 of 13 shards .* missing: (\S+, ){3}\.\.\.; copy"):
        shards.check_complete(sorted(folder.glob("*.arrayrecord")))


@pytest.mark.parametrize(
    ("vocab_size", "itemsize"), [(258, 2), (2**16, 2), (2**16 + 1, 4), (2**20, 4)]
)
def test_token_dtype_holds_the_largest_id(vocab_size, itemsize):
    dtype = shards.token_dtype(vocab_size)
    assert dtype.itemsize == itemsize
    assert np.array([vocab_size - 1]).astype(dtype)[0] == vocab_size - 1


def test_another_tokenizer(folder):
    with pytest.raises(ValueError) as error:
        open_folder(folder, OtherTokenizer())
    made = tokenizers.load("byte").fingerprint[:12]
    assert str(error.value) == (
        f"{folder}: the shards were made with tokenizer 'byte' (sha256 {made}), not with "
        "'other.json' (sha256 ffffffffffff); set tokenizer to the first or prepare them again"
    )


def test_shards_without_metadata(folder):
    (folder / shards.METADATA).unlink()
    with pytest.raises(ValueError, match="shards without metadata.json; write them with prep"):
        open_folder(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"format": "x"},
        {"dtype": "O"},
        {"ids_per_record": 0},
        {"tokenizer": {}},
        {"shards": [{"file": "a"}]},
    ],
)
def test_metadata_that_are_not_ours(folder, change):
    path = folder / shards.METADATA
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError) as error:
        open_folder(folder)
    assert str(error.value) == f"{path}: not the metadata of fusedkv_jax.tokens version 1"


def test_a_shard_that_is_not_listed(folder):
    extra = folder / "train-extra.arrayrecord"
    extra.touch()
    with pytest.raises(ValueError, match="train-extra.arrayrecord: not among the shards that"):
        open_folder(folder)


def test_a_missing_or_damaged_index(folder):
    index = folder / "train-00001-of-00003.arrayrecord.index.npz"
    data = index.read_bytes()
    index.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="00001-of-00003.arrayrecord.index.npz: damaged index"):
        open_folder(folder)
    index.unlink()
    with pytest.raises(ValueError, match="its index train-00001-of-00003.arrayrecord.index.npz"):
        open_folder(folder)


def test_an_index_of_other_records(folder):
    first, third = (folder / shards.shard_name("train", i, 3) for i in (0, 2))
    third.rename(first)
    train, _ = open_folder(folder)
    with pytest.raises(ValueError, match="2 records, but its index has 3; write it again"):
        train.read(0)


def test_token_ids_outside_the_vocabulary(folder):
    path = folder / shards.shard_name("train", 0, 3)
    writer = shards.ShardWriter(path, np.dtype("<u2"))
    writer.add(np.array([256, 300, 257]), 1)
    writer.close()
    train, _ = open_folder(folder)
    with pytest.raises(ValueError, match="record 0 has token id 300, outside the vocabulary of"):
        train.read(0)


def test_an_index_with_other_lengths(folder):
    index = folder / "heldout-00000-of-00001.arrayrecord.index.npz"
    np.savez(index, lengths=np.array([6, 8]), num_bytes=np.array([1, 1]))
    _, heldout = open_folder(folder)
    with pytest.raises(ValueError, match="record 5 does not have the length that the index says"):
        heldout.read(1)
