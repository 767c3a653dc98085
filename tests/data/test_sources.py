"""What a source names is found in a fixed order, and a name that finds nothing says so."""

import os
import pathlib

import pytest

from fusedkv_jax.data.sources import list_files, read_all


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b.py", "notes.bin", ".hidden/c.txt", "a/.d.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of {name}")
    (tmp_path / "empty.txt").touch()
    return tmp_path


def test_a_folder_is_read_recursively_in_sorted_order(folder):
    found = [path.relative_to(folder).as_posix() for path in list_files([str(folder)])]
    assert found == ["a/b.py", "a/z.md", "b.txt", "empty.txt"]


def test_globs_and_repeated_files(folder):
    inputs = [f"{folder}/b.txt", f"{folder}/**/*.py", f"{folder}/?.txt"]
    assert [path.name for path in list_files(inputs)] == ["b.txt", "b.py"]


def test_a_file_is_read_once_however_it_is_spelled(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "link.txt").symlink_to("b.txt")
    inputs = ["empty.txt", "b.txt", f"{folder}/b.txt", "a/../b.txt", "link.txt", "a", "./empty.txt"]
    found = [path.as_posix() for path in list_files(inputs)]
    assert found == ["empty.txt", "b.txt", "a/b.py", "a/z.md"]
    assert list_files([*reversed(inputs)])[3] == pathlib.Path("link.txt")


def test_read_all_leaves_out_empty_documents_and_counts_bytes_over_files(folder):
    documents = list(read_all(list_files([str(folder)])))
    assert [document.text for document in documents] == [
        "text of a/b.py",
        "text of a/z.md",
        "text of b.txt",
    ]
    assert [document.bytes_read for document in documents] == [14, 28, 41]


def test_python_stdlib():
    files = list_files(["python_stdlib"])
    names = [path.name for path in files]
    assert pathlib.Path(pathlib.__file__) in files or "pathlib" in {p.parent.name for p in files}
    assert {"argparse.py", "typing.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    parts = {part for path in files for part in path.parts}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert files == sorted(files, key=lambda path: path.as_posix())


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "b.tx",
            FileNotFoundError,
            "no such file or folder: '{0}/b.tx'; did you mean 'b.txt'?",
        ),
        ("no/x", FileNotFoundError, "no such file or folder: '{0}/no/x'"),
        ("*.gz", FileNotFoundError, "no file matches '{0}/*.gz'"),
        (
            "void",
            ValueError,
            "{0}/void: the folder has no text, JSON, Parquet or ArrayRecord files",
        ),
    ],
)
def test_a_name_that_finds_nothing(folder, name, error, message):
    (folder / "void").mkdir()
    with pytest.raises(error) as caught:
        list_files([f"{folder}/{name}"])
    assert str(caught.value) == message.format(folder)


def test_no_input():
    with pytest.raises(ValueError, match="no input: name at least one"):
        list_files([])


def test_pipes_and_broken_links_are_called_what_they_are(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to("gone.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    cases = {
        "pipe.txt": r"is a pipe \(FIFO\).*write its content to a file",
        "link.txt": "is a broken link, to 'gone.txt'",
        "loop.txt": "is a broken link, to 'loop.txt'",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            list_files([str(tmp_path / name)])
    with pytest.raises(ValueError, match="(pipe|link|loop).txt: is a"):
        list_files([str(tmp_path)])
