"""Every command and snippet of the documentation works: commands are read, snippets are run."""

import pathlib
import re

import pytest

import fusedkv_jax as fkv
from fusedkv_jax.data import tokenizers
from tests.docs.documented import PAGES, ROOT, SOURCES, commands, snippets
from tests.experiments.commands import run_several

# Words that stand for something of the reader's own.
_PLACES = {"MINE.py": "CONFIG", "HOST:PORT": "localhost:8476"}
# Run for real, at the size that is written: the other programs have tests of their own.
_RUN = ("describe", "costs")


def test_every_command_is_read_and_the_quick_ones_run(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text("from experiments.configs.demo import get_config\n")
    places = {**_PLACES, "MINE.py": str(config)}
    lines, sources = [], []
    for path in [*PAGES, *SOURCES]:
        for program, arguments in commands(path):
            for name, own in places.items():
                arguments = [argument.replace(name, own) for argument in arguments]
            quick = program in _RUN and path == ROOT / "README.md"
            lines.append((program, arguments if quick else ["--only-read", *arguments]))
            sources.append(path.relative_to(ROOT))
    assert len(lines) > 40 and {program for program, _ in lines} >= {"train", "generate", "costs"}
    found = run_several(lines)
    for path, line, (code, _, error) in zip(sources, lines, found, strict=True):
        assert code == 0, (path, line, error)


def _page(name: str) -> pathlib.Path:
    return next(path for path in PAGES if path.name == name)


def test_the_readme_snippet_runs():
    (snippet,) = snippets(_page("README.md"))
    # A toy of the same kind: what is said about the names and arguments stays as it is written.
    small = 'layout="fusedkv", num_layers=4, d_model=32, num_heads=2, d_ff=64'
    assert 'layout="fusedkv"' in snippet and "max_tokens=32" in snippet
    snippet = snippet.replace('layout="fusedkv"', small).replace("max_tokens=32", "max_tokens=3")
    names = {}
    exec(snippet, names)
    assert names["logits"].shape == (1, names["config"].vocab_size)
    assert names["cache"].lengths.tolist() == [4]


@pytest.mark.slow
def test_other_snippets_run():
    config = fkv.presets.get(
        "demo", layout="fusedkv", num_layers=4, d_model=32, num_heads=4, d_ff=64
    )
    import jax
    from flax import nnx

    names = {
        "fkv": fkv,
        "jax": jax,
        "model": fkv.Decoder(config, rngs=nnx.Rngs(0)),
        "tokenizer": tokenizers.load("byte"),
        "prompts": [[1, 2, 3], [4]],
        "params": fkv.SamplingParams(max_tokens=2, temperature=0),
    }
    pages = [path for path in PAGES if path.name != "README.md" and snippets(path)]
    assert pages
    for path in pages:
        for snippet in snippets(path):
            exec(snippet.replace("max_tokens=64", "max_tokens=4"), dict(names))


def test_installing_names_what_can_be_installed():
    """There is no package of this name in an index: extras are those of the folder."""
    folders = ("experiments", "fusedkv_jax", "pallas_kernels", "tests")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in {*PAGES, *sources} - {pathlib.Path(__file__)}:
        text = path.read_text(encoding="utf-8")
        for command in re.findall(r"pip install ([^`\n#]*)", text):
            assert not re.match(r"['\"]?fusedkv_jax(?! @)", command), (path, command)
