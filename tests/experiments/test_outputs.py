"""Outputs: what is in the way is said before the work, and what is there is whole."""

import os
import pathlib

import pytest

from experiments.common.outputs import (
    check_new_folder,
    check_output,
    check_results_file,
    complete_folder,
)


def test_a_folder_appears_when_it_is_complete(tmp_path):
    output = tmp_path / "out"
    with complete_folder("output", output) as folder:
        (folder / "a").write_text("a")
        assert not output.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "a").read_text() == "a"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_half_written_is_left(tmp_path, error):
    with pytest.raises(error), complete_folder("output", tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_came_meanwhile_is_kept(tmp_path):
    output = tmp_path / "out"
    with (
        pytest.raises(ValueError, match="output .*out is not empty"),
        complete_folder("output", output) as folder,
    ):
        (folder / "a").write_text("ours")
        output.mkdir()
        (output / "a").write_text("theirs")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]
    assert (output / "a").read_text() == "theirs"


def test_what_is_in_the_way(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe")
    for path, folder, message in (
        ("", True, "is empty"),
        (tmp_path / "link", True, "link to what does not exist"),
        (tmp_path / "link/x.json", False, "link to what does not exist"),
        (tmp_path / "pipe", False, "is a pipe"),
        (tmp_path / "pipe/x", True, "[Nn]ot a directory"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            check_output(path, folder=folder)
    for path, message in ((tmp_path / "link", "link to what"), (tmp_path / "pipe", "is a file")):
        with pytest.raises(ValueError, match=message):
            check_new_folder("output", path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]
    assert check_output(pathlib.Path(os.devnull)) == pathlib.Path(os.devnull)


@pytest.mark.parametrize("foreign", ["my notes", "[1, 2]", '{"experiment": "mine"}', "{" * 5000])
def test_results_of_others_are_not_replaced(tmp_path, foreign):
    path = tmp_path / "results.json"
    path.write_text(foreign)
    with pytest.raises(ValueError, match="was written by something else; move it away"):
        check_results_file(path)
    assert path.read_text() == foreign


def test_own_results_and_empty_files_are_replaced(tmp_path):
    path = tmp_path / "results.json"
    assert check_results_file(path) == path
    for own in ("", '{"experiment": "demo", "environment": {}, "layouts": {}}'):
        path.write_text(own)
        assert check_results_file(path) == path
