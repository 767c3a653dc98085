"""Every snippet of Python in the documentation runs, and prints what the page says it prints."""

import contextlib
import io
import pathlib
import re

import pytest

import fusedkv_jax as fkv
from fusedkv_jax.layouts import LayoutError, named
from tests.docs.documented import PAGES, ROOT, fences

LAYOUTS = ROOT / "docs/guides/layouts.md"
# Pages whose snippets cost no more than the tests around them.
QUICK = ("README.md", "docs/design/kernels.md", "docs/guides/layouts.md")
# What is smaller here than it is on the page.
SMALLER = {
    'fkv.presets.get("demo", layout="fusedkv")': 'fkv.presets.get("demo", layout="fusedkv", '
    "num_layers=4, d_model=32, num_heads=2, d_ff=64)",
    "max_tokens=32": "max_tokens=3",
    "max_tokens=64": "max_tokens=4",
}
SNIPPETS = [path for path in PAGES if any(f.language == "python" for f in fences(path))]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=() if str(path.relative_to(ROOT)) in QUICK else pytest.mark.slow,
        )
        for path in SNIPPETS
    ],
)
def test_snippets_run_and_print_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(named, "_REGISTRY", dict(named._REGISTRY))  # a page may add to it
    names = {} if str(page.relative_to(ROOT)) in QUICK else _what_readers_have(tmp_path)
    blocks = fences(page)
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language != "python":
            continue
        code = block.text
        for text, smaller in SMALLER.items():
            code = code.replace(text, smaller)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        if after is not None and after.language == "text" and not after.follows.strip():
            assert printed.getvalue() == after.text, code
    if page.name == "README.md":
        assert names["logits"].shape == (1, names["config"].vocab_size)
        assert names["cache"].lengths.tolist() == [4]


def _what_readers_have(folder: pathlib.Path) -> dict:
    """A model with a tokenizer, as Python names, a folder and a file."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tokenizers import Tokenizer, models

    from fusedkv_jax.data import tokenizers
    from tests.interop.test_gguf_file import tensors, write

    config = fkv.presets.get(
        "demo", layout="fusedkv", num_layers=4, d_model=32, num_heads=4, d_ff=64
    )
    plain = fkv.Decoder(config.replace(layout="mha"), rngs=nnx.Rngs(0))
    fkv.interop.save_huggingface(plain, folder / "FOLDER")
    words = models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")
    Tokenizer(words).save(str(folder / "FOLDER" / "tokenizer.json"))
    named = folder / "FOLDER" / "tokenizer_config.json"
    named.write_text('{"eos_token": "</s>"}')
    two = tensors()
    upper = {
        re.sub(r"blk\.(\d)", lambda m: f"blk.{int(m[1]) + 2}", name): two[name] for name in two
    }
    write(folder / "FILE.gguf", two | upper, block_count=4)
    return {
        "fkv": fkv,
        "jax": jax,
        "jnp": jnp,
        "model": fkv.Decoder(config, rngs=nnx.Rngs(0)),
        "tokenizer": tokenizers.load("byte"),
        "tokens": jnp.arange(64, dtype=jnp.int32).reshape(4, 16) % 37,
        "prompts": [[1, 2, 3], [4]],
        "params": fkv.SamplingParams(max_tokens=2, temperature=0),
    }


def test_the_drawing_of_the_front_pages_is_the_one_of_the_layout():
    drawing = fkv.layouts.draw(fkv.layouts.get("fusedkv", 8)).partition("\n\n")[0] + "\n"
    for page in (ROOT / "README.md", ROOT / "docs/index.md"):
        assert drawing in [block.text for block in fences(page)]


def _rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading of the page about layouts."""
    section = LAYOUTS.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", section, re.M)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_layout_of_the_page_is_what_the_table_says():
    rows = _rows("The layouts of the field")
    listed = {row[0].split("`")[1].partition(":")[0] for row in rows}
    assert listed == set(fkv.layouts.names())
    for name, grammar, cache, depth, reads in rows:
        layout = fkv.layouts.resolve(name.split("`")[1], 8)
        terms = [len(layout.attended(kind, i)) for kind in fkv.layouts.KINDS for i in range(8)]
        assert (layout.cache_ratio, layout.prefill_depth) == (float(cache), int(depth)), name
        assert sum(terms) / len(terms) == float(reads), name
        if grammar.startswith("`"):
            assert fkv.layouts.parse(grammar.strip("`")) == layout, name
        else:
            with pytest.raises(LayoutError):
                fkv.layouts.format(layout)


def test_every_example_of_the_grammar_is_read_or_refused_as_the_page_says():
    examples = [row[2].strip("`") for row in _rows("The grammar")]
    assert [fkv.layouts.parse(text).num_layers for text in examples] == [2, 3, 4, 3, 8]
    for text, reason in _rows("What makes no sense"):
        with pytest.raises(LayoutError, match=re.escape(reason)):
            fkv.layouts.parse(text.strip("`"))
