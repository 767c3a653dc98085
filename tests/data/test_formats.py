"""Every format gives the same documents, and each kind of damage its own clear line."""

import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from fusedkv_jax.data.formats import format_of, read_documents

TEXTS = ["plain", "zwei\nZeilen äöü", "日本語 🙂", "", 'tab\t"quoted" \\ end\n']
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS))


def read(path, **options):
    return [document.text for document in read_documents(path, **options)]


def zstd_of_two_frames(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor()
    return compressor.compress(data[:50]) + compressor.compress(data[50:])


ENCODERS = {
    "jsonl": bytes,
    "json": bytes,
    "jsonl.gz": gzip.compress,
    "jsonl.xz": lzma.compress,
    "jsonl.zst": zstd_of_two_frames,
}


@pytest.mark.parametrize("suffix", ENCODERS)
def test_json_lines(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(ENCODERS[suffix](LINES.encode()))
    assert read(path) == TEXTS
    *_, last = read_documents(path)
    assert last.where == f"{path}:{len(TEXTS)}"
    assert last.bytes_read == path.stat().st_size


def test_json_lines_may_be_empty_have_a_bom_and_unescaped_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xc3\xa4"}\n\n  \n{"text": "b"}')
    assert read(path) == ["ä", "b"]


def test_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    parquet.write_table(pa.table({"id": range(5), "body": TEXTS}), path, row_group_size=2)
    assert read(path, text_key="body") == TEXTS
    *_, last = read_documents(path, text_key="body")
    assert last.bytes_read == path.stat().st_size


@pytest.mark.parametrize("suffix", ["txt", "md", "py", "txt.gz", "txt.xz", "txt.zst"])
def test_text_is_one_document(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    encode = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstd_of_two_frames}
    path.write_bytes(encode.get(suffix.split(".")[-1], bytes)(LINES.encode()))
    assert read(path) == [LINES]


def test_format_of():
    names = {
        "a.TXT": "text",
        "a.b.jsonl.zst": "json",
        "a.parquet": "parquet",
        "a.parquet.gz": None,
        "a.bin": None,
        "gz": None,
        "a.gz": None,
    }
    assert {name: format_of(Path(name)) for name in names} == names


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"abc\xff", "byte 3 (0xff) is not UTF-8; repair the file or set"),
        ("a.txt", b"\xef\xbb\xbfab\xe4", "byte 5 (0xe4) is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xfc"}\n', ":2: byte 24 (0xfc) is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ":2: not a line of JSON: Expecting value"),
        ("a.jsonl", b'["a"]\n', ":1: a JSON line must be an object, got list"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', ":1: no field 'text' (there are: body, id);"),
        ("a.jsonl", b'{"text": 5}\n', ":1: 'text' must be a string, got int"),
        ("a.jsonl", b'{"text": null}\n', ":1: 'text' must be a string, got null"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', ":1: 'text' has an unpaired surrogate at char"),
        ("a.jsonl.gz", b"not gzip", "damaged or truncated: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-9], "damaged or truncated: Compressed"),
        ("a.jsonl.xz", lzma.compress(LINES.encode())[:-9], "damaged or truncated: Compressed"),
        ("a.jsonl.xz", b"not xz", "damaged or truncated: Input format not supported"),
        ("a.jsonl.zst", b"not zstd", "damaged or truncated: ZSTD decompress failed"),
        (
            "a.parquet",
            b"not parquet",
            "cannot be read as Parquet: Parquet magic bytes not found",
        ),
        ("a.bin", b"", "unknown file type '.bin'; known are .txt, .md, .py, .jsonl, .json,"),
    ],
)
def test_damage_is_one_clear_line(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_truncated_zstd_is_not_taken_for_the_end(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(LINES.encode() * 100)[:-20])
    with pytest.raises(ValueError, match="a.jsonl.zst: damaged or truncated"):
        read(path)


def test_parquet_without_the_column_names_those_there_are(tmp_path):
    path = tmp_path / "data.parquet"
    parquet.write_table(pa.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(ValueError, match=r"no column 'text' \(there are: id, body\); set text_key"):
        read(path)


def test_errors_replace_keeps_the_rest(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes(b"ab\xffcd")
    lines.write_bytes(b'{"text": "x\xffy"}\n{"text": "x\\ud800y"}\n')
    assert read(text, errors="replace") == ["ab\ufffdcd"]
    replaced = read(lines, errors="replace")
    assert replaced[0] == "x\ufffdy"
    assert replaced[1][0] == "x" and replaced[1][-1] == "y"
    assert set(replaced[1][1:-1]) == {"\ufffd"}


@pytest.mark.parametrize("suffix", ["txt.gz", "txt.xz", "txt.zst", "jsonl.zst", "jsonl"])
def test_a_small_file_with_a_huge_document_is_refused_before_it_fills_the_memory(tmp_path, suffix):
    encoders = {"txt.gz": gzip.compress, "txt.xz": lzma.compress, "jsonl": bytes}
    path = tmp_path / f"bomb.{suffix}"
    text = b" " * 40 * 2**20
    path.write_bytes(encoders.get(suffix, zstandard.ZstdCompressor().compress)(text))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb.*a document of more than 1 MiB; divide the text"):
        read(path, max_bytes=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_a_huge_parquet_value_is_refused(tmp_path):
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pa.table({"text": ["short", "x" * 2**21]}), path)
    with pytest.raises(ValueError, match="bomb.parquet:2: a document of more than 1 MiB"):
        read(path, max_bytes=2**20)


def test_a_nesting_bomb_is_one_line(tmp_path):
    path = tmp_path / "bomb.jsonl"
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match="bomb.jsonl:1: not a line of JSON.*nested too deep"):
        read(path)
