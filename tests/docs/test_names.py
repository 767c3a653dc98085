"""Files, classes and functions that the pages about the design name are there."""

import functools
import re

import pytest

from tests.docs.documented import ROOT

PAGES = ("docs/design/architecture.md", "docs/design/decisions.md", "CONTRIBUTING.md")
PACKAGES = ("fusedkv_jax", "pallas_kernels", "experiments", "tests")
# What programs write.
WRITTEN = ("experiments/results/gpu/DEVICE/", "results.md")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_NAME = re.compile(r"\.?[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@functools.cache
def _sources() -> dict[str, str]:
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }


@functools.cache
def _words() -> set[str]:
    own = "tests/docs/test_names.py"
    texts = [text for name, text in _sources().items() if name != own]
    return {word for text in texts for word in re.findall(r"\w+", text)} | {
        part for name in _sources() for part in re.split(r"[/.]", name)
    }


def _file(name: str) -> bool:
    """A path from the root, or from one of the packages."""
    return any((ROOT / folder / name).exists() for folder in ("", *PACKAGES))


def missing(text: str) -> list[str]:
    """What a page names in spans of code that is not in the repository."""
    prose = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)
    spans = [span.strip() for span in _SPAN.findall(prose)]
    paths = [s for s in spans if re.fullmatch(r"[\w./]+\.(py|md|toml|txt|yml)|[\w/]+/", s)]
    names = [s for s in spans if _NAME.fullmatch(s) and s not in paths]
    return [path for path in paths if path not in WRITTEN and not _ends(path)] + [
        name for name in names if not set(filter(None, name.split("."))) <= _words()
    ]


def _ends(path: str) -> bool:
    """Some file or folder has this path, or ends with it: `stores.py` in a sentence on caches."""
    if _file(path.rstrip("/")):
        return True
    return any(f"/{name}".endswith(f"/{path}") for name in _sources())


@pytest.mark.parametrize("page", PAGES)
def test_what_the_pages_name_is_there(page):
    assert not missing((ROOT / page).read_text(encoding="utf-8"))


def test_a_name_that_is_gone_is_found():
    text = "`model/stacks.py` runs `Streams.of_nothing`, see `model/stack.py` and `Streams.put`."
    assert missing(text) == ["model/stacks.py", "Streams.of_nothing"]


def test_each_walk_enters_a_file_once():
    text = (ROOT / PAGES[0]).read_text(encoding="utf-8").partition("\n## Three walks\n")[2]
    walks = text.partition("\n## ")[0].split("\n### ")[1:]
    assert len(walks) == 3
    for walk in walks:
        files = re.findall(r"^\| `([^`]+)` \|", walk, re.M)
        assert len(files) > 10 and len(files) == len(set(files)), walk
        assert all(map(_file, files)), walk
