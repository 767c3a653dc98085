"""Pages of which a program writes a part: the rest stays, and a mark that is missing is said."""

import pathlib

import pytest

from experiments import tpu_decode, tpu_slices
from experiments.common import pages

MARKS = ("<!-- table -->\n", "<!-- end of table -->\n")
ROOT = pathlib.Path(__file__).parents[2]


def test_what_is_around_the_part_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n\n{MARKS[1]}\nafter\n")
    pages.replace_part(page, MARKS, "| new |\n")
    assert page.read_text() == f"before\n{MARKS[0]}\n| new |\n\n{MARKS[1]}\nafter\n"


@pytest.mark.parametrize(
    "text",
    [
        "before\nafter\n",
        f"before\n{MARKS[0]}after\n",
        f"before\n{MARKS[1]}after\n",
        f"before\n{MARKS[1]}{MARKS[0]}after\n",
        f"{MARKS[0]}a\n{MARKS[1]}{MARKS[0]}b\n{MARKS[1]}",
    ],
    ids=["none", "no_end", "no_start", "reversed", "twice"],
)
def test_a_page_without_both_marks_is_refused_in_one_line_and_stays(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    for refused in (
        lambda: pages.check_marks(page, MARKS),
        lambda: pages.replace_part(page, MARKS, "new"),
    ):
        with pytest.raises(ValueError) as error:
            refused()
        assert "'<!-- end of table -->'" in str(error.value) and "\n" not in str(error.value)
    assert page.read_text() == text


@pytest.mark.parametrize("program", [tpu_decode, tpu_slices])
def test_the_committed_page_has_the_marks_of_each_program(program):
    pages.check_marks(ROOT / "docs/guides/tpu_slices.md", program._MARKS)


def test_results_are_read_or_begun_anew(tmp_path):
    path = tmp_path / "results.json"
    assert pages.read_results(path, {}) == {}
    path.write_text('{"a": 1}')
    assert pages.read_results(path, {}) == {"a": 1}
    for text, none in (("{", {}), ('{"a": 1}', [])):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^--results=.*(not JSON|not hold a list)"):
            pages.read_results(path, none)
