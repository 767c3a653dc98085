"""prepare_data by several workers: the same bytes, whatever their number and its interruptions."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.common import outputs
from experiments.common.preparation import Preparation, prepare
from fusedkv_jax.data import DataConfig, chunks, load_corpus, shards, tokenizers

ROOT = pathlib.Path(__file__).parents[2]
SHARDS = 3
# Chunks of a few documents and units of one or two files, set before a program starts.
SMALL = "chunks.CHARACTERS_PER_CHUNK, chunks.BYTES_PER_UNIT = 400, 3000"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of five files, of which two make a unit; documents of 0 to 180 characters."""
    folder = tmp_path_factory.mktemp("text")
    for name, count in (("a", 60), ("b", 3), ("c", 3), ("d", 40), ("e", 1)):
        lines = [json.dumps({"text": f"{name}{i} " + "öx" * (7 * i % 90)}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join([*lines, '{"text": ""}']) + "\n")
    (folder / "own.txt").write_text("held out by name")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(chunks, "CHARACTERS_PER_CHUNK", 400)
    monkeypatch.setattr(chunks, "BYTES_PER_UNIT", 3000)


def preparation(text, output, **changes):
    settings = {"num_shards": SHARDS, "holdout_fraction": 0.2, "heldout": [str(text / "own.txt")]}
    return Preparation(input=[f"{text}/*.jsonl"], output_dir=str(output), **settings | changes)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def work_folder(output):
    return output.with_name(f".{output.name}.unfinished")


@pytest.fixture(scope="module")
def expected(text, tmp_path_factory):
    """The shards that one process writes without a stop, of one chunk."""
    output = tmp_path_factory.mktemp("expected") / "tokens"
    prepare(preparation(text, output))
    return digests(output)


def test_documents_go_to_the_shards_in_turn(text, tmp_path, expected):
    output = tmp_path / "tokens"
    prepare(preparation(text, output))
    assert digests(output) == expected  # of large chunks
    source = DataConfig(source=f"{text}/*.jsonl", seq_len=8, batch_size=1, holdout_fraction=0.2)
    train = load_corpus(source).train
    for shard in range(SHARDS):
        name = output / shards.shard_name("train", shard, SHARDS)
        found, _ = shards.open_splits([name], tokenizers.load("byte"), None)
        documents = range(shard, len(train.lengths), SHARDS)
        assert len(found.lengths) == len(documents)
        for place, document in enumerate(documents):
            assert found.read(place).tolist() == train.read(document).tolist()


@pytest.mark.parametrize("workers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_the_bytes_do_not_depend_on_the_workers(text, tmp_path, expected, workers):
    output = tmp_path / "tokens"
    prepare(preparation(text, output, workers=workers))
    assert digests(output) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray and of pandas
def test_the_bytes_are_the_same_on_ray(text, tmp_path, expected):
    pytest.importorskip("ray", reason="needs Ray: pip install 'ray[data]'")
    output = tmp_path / "tokens"
    prepare(preparation(text, output, ray="local"))
    assert digests(output) == expected
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match="bad.jsonl:1: 'text' must be a string, got int"):
        prepare(preparation(tmp_path, tmp_path / "x", heldout=(), ray="local"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "tokens"]


def test_it_goes_on_after_a_stop_before_any_file(text, tmp_path, expected, monkeypatch):
    output, name_file, written = tmp_path / "tokens", shards.unfinished, []

    def stop_at_the_third(path):
        written.append(path.name)
        if len(written) == 3:
            path.with_name(f"{path.name}.0{shards.UNFINISHED}").write_bytes(b"half")
            raise KeyboardInterrupt
        return name_file(path)

    monkeypatch.setattr(shards, "unfinished", stop_at_the_third)
    everything, stops = [], 0
    while not output.exists():
        try:
            prepare(preparation(text, output))
        except KeyboardInterrupt:
            stops += 1
            everything += written[:2]
            written.clear()
    everything += written
    assert stops > 15 and digests(output) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    # No chunk was made twice.
    made = [name for name in everything if name.endswith(".safetensors")]
    assert len(made) > 20 and len(made) == len(set(made))


def test_max_documents_after_a_stop(text, tmp_path, monkeypatch):
    settings = {"max_documents": 65, "heldout": ()}
    once = prepare(preparation(text, tmp_path / "once", **settings))
    assert once["train"]["documents"] + once["heldout"]["documents"] == 65
    name_file, count = shards.unfinished, [0]

    def stop_once(path):
        count[0] += 1
        if count[0] == 12:
            raise KeyboardInterrupt
        return name_file(path)

    monkeypatch.setattr(shards, "unfinished", stop_once)
    with pytest.raises(KeyboardInterrupt):
        prepare(preparation(text, tmp_path / "twice", **settings))
    prepare(preparation(text, tmp_path / "twice", **settings))
    assert digests(tmp_path / "twice") == digests(tmp_path / "once")


def test_what_was_begun_otherwise_is_refused_and_kept(text, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    output = tmp_path / "tokens"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chunks, "write_shard", stop)
        prepare(preparation(text, output))
    before = sorted(work_folder(output).rglob("*"))
    for changes, what in (({"num_shards": 2}, "settings"), ({"heldout": ()}, "heldout")):
        with pytest.raises(ValueError, match=f"was begun with other {what} and is not finished"):
            prepare(preparation(text, output, **changes))
    with (
        outputs.resumable_folder("output_dir", tmp_path / "other", {}),
        pytest.raises(ValueError, match="other is being written by another process"),
    ):
        prepare(preparation(text, tmp_path / "other"))
    assert sorted(work_folder(output).rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["program", "worker"])
def test_a_killed_preparation_goes_on(text, tmp_path, expected, victim):
    output = tmp_path / "tokens"
    settings = preparation(text, output, workers=2)
    code = (
        "import time; from experiments.common import cli, preparation as p; "
        f"from fusedkv_jax.data import chunks; {SMALL}; read = chunks.read\n"
        "def slowly(*a):\n"
        "    for chunk in read(*a):\n"
        "        yield chunk\n"
        "        time.sleep(0.05)\n"
        f"chunks.read = slowly\n"
        f"cli.failures.exit_with(lambda: p.prepare(p.{settings}) and None)"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    children = pathlib.Path(f"/proc/{program.pid}/task/{program.pid}/children")
    deadline = time.monotonic() + 120
    while not list(work_folder(output).glob("work/*.safetensors")):
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    pids = [int(pid) for pid in children.read_text().split()]
    workers = [pid for pid in pids if b"spawn_main" in cmdline(pid)]
    assert workers
    os.kill(program.pid if victim == "program" else workers[0], signal.SIGKILL)
    _, error = program.communicate(timeout=120)
    if victim == "worker":
        assert program.returncode == 2
        assert error.splitlines()[-1].startswith("error: a worker died, perhaps for want of mem")
    while any(b"spawn_main" in cmdline(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kept = {p: p.stat().st_mtime_ns for p in work_folder(output).glob("work/*.safetensors")}
    assert kept and not output.exists()
    prepare(settings)
    assert digests(output) == expected


def cmdline(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
