"""Convert models: python -m experiments.convert --model=FOLDER|FILE.gguf --output=DIR --check.

A Hugging Face folder or a GGUF file becomes a work directory of ours, of any layout; a training run
(--workdir) becomes a Hugging Face folder. --format says which of the two to write, where it is
not the other one: a GGUF file may become a folder.

--check reads what was written and compares both sides: the logits of a text and what each writes
greedily after it, also those of transformers where it is installed and can load a side.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

import fusedkv_jax as fkv
from experiments.common import cli, models, outputs
from experiments.common.documents import Document
from fusedkv_jax import costs, interop, training
from fusedkv_jax.data import sources, tokenizers
from fusedkv_jax.training.monitoring.metrics import step_of

if TYPE_CHECKING:
    import numpy as np

FLAGS = flags.FLAGS

TEXT = "The quick brown fox jumps over the lazy dog, and the cache of 3072 bytes is full again."
NEW_TOKENS = 30
_BYTES = "none: ids 0 to 255 are the bytes of UTF-8, 256 is BOS, 257 EOS (`tokenizer=byte` here)"


def define_flags() -> None:
    """Define the flags."""
    models.define_flags()
    flags.DEFINE_string("output", None, "Where to write; a new or empty folder.")
    flags.DEFINE_enum(
        "format",
        None,
        ["workdir", "huggingface"],
        "What to write; default workdir for --model, huggingface for --workdir.",
    )
    flags.DEFINE_string("layout", None, "Layout of the model; default the original's.")
    flags.DEFINE_bool("check", False, "Compare what was written with the original.")
    flags.DEFINE_string("text", TEXT, "Text of --check.")
    cli.only_with("layout", model=True)
    cli.only_with("text", check=True)


def main() -> int:
    output = pathlib.Path(cli.require("output")).expanduser()
    # A run may hold what was made of it; a folder of others stays as it is.
    outputs.check_new_folder("--output", output, [FLAGS.model] if FLAGS.model else [])
    kind = FLAGS.format or ("workdir" if FLAGS.model else "huggingface")
    loaded = models.load(layout=FLAGS.layout)
    with outputs.complete_folder("--output", output) as folder:
        loaded = _write(loaded, kind, folder, output)
    count = costs.parameter_count(loaded.model.config)
    print(f"{loaded.where} -> {output}: {count:,} parameters, {_layout(loaded.model)}")
    report: Document = {"output": str(output), "format": kind, "parameters": count}
    same = True
    if FLAGS.check:
        rows = _check(loaded, output, kind)
        _print_table(rows)
        report["check"] = rows
        same = all(row["same text"] for row in rows[1:])
    print(json.dumps(report))
    return 0 if same else 1


def _write(
    loaded: models.Loaded, kind: str, folder: pathlib.Path, output: pathlib.Path
) -> models.Loaded:
    """Write into `folder`, which will be `output`; returns the model with its tokenizer there."""
    tokenizer = loaded.config.data.tokenizer
    if kind == "huggingface":
        interop.save_huggingface(loaded.model, folder, tokenizer=tokenizer, facts=_facts(loaded))
        return loaded
    if tokenizer != "byte":
        interop.copy_tokenizer(tokenizer, folder / "tokenizer")
        loaded = models.with_tokenizer(loaded, str((output / "tokenizer").resolve()))
    training.save_model(loaded.model, loaded.config, folder)
    return loaded


def _facts(loaded: models.Loaded) -> dict[str, str]:
    """What the model card says of where the model is from, and of a tokenizer that is no file."""
    data = loaded.config.data
    facts = {"tokenizer": _BYTES} if data.tokenizer == "byte" else {}
    if loaded.step is None:
        return facts | {"made from": pathlib.Path(loaded.where).name}
    tokens = loaded.step * data.batch_size * data.seq_len
    facts |= {"data": _named(data.source), "tokens trained on": f"{tokens:,}"}
    metrics = pathlib.Path(loaded.where).expanduser() / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines() if metrics.is_file() else ()
    rows = (json.loads(line) for line in lines if step_of(line) == loaded.step)
    losses = [row["eval/loss"] for row in rows if row.get("eval/loss") is not None]
    return facts | ({"held-out loss, nats per token": f"{losses[-1]:.4f}"} if losses else {})


def _named(source: str) -> str:
    """The sources of a mixture with their shares; without folders, which are the trainer's own."""
    parts = [(pathlib.Path(name).name, weight) for name, weight in sources.mixture(source)]
    if len(parts) == 1:
        return parts[0][0]
    total = sum(weight for _, weight in parts)
    return ", ".join(f"{name} ({weight / total:.0%})" for name, weight in parts)


def _layout(model: fkv.Decoder) -> str:
    layout = model.config.kv_layout
    return f"layout {layout.spec}" if layout.spec else f"{layout.num_layers} layers"


def _check(loaded: models.Loaded, output: pathlib.Path, kind: str) -> list[Document]:
    """A row for each side: how far its logits are from the first's, and whether its text is."""
    import numpy as np

    tokenizer = tokenizers.load(loaded.config.data.tokenizer)
    ids = tokenizer.encode(FLAGS.text)[: loaded.model.config.max_length - NEW_TOKENS]
    if not ids:
        raise ValueError("--text has no tokens; give more of it")
    if kind == "workdir":
        written = models.load_run(str(output)).model
    else:
        written = models.load_pretrained(str(output), tokenizer="byte").model
    sides: dict[str, Callable[[], tuple[np.ndarray, list[int]]]] = {
        "original": lambda: _ours(loaded.model, ids),
        "written": lambda: _ours(written, ids),
    }
    for name, path in (("original", loaded.where), ("written", str(output))):
        reader = _transformers(path)
        if reader is not None:
            sides[f"{name}, transformers"] = lambda reader=reader: _theirs(reader, ids)
    found = {name: side() for name, side in sides.items()}
    logits, text = found["original"]
    return [
        {
            "side": name,
            "largest logit difference": float(np.abs(other - logits).max()),
            "same text": bool(written == text),
        }
        for name, (other, written) in found.items()
    ]


def _ours(model: fkv.Decoder, ids: list[int]) -> tuple[np.ndarray, list[int]]:
    import jax.numpy as jnp
    import numpy as np

    params = fkv.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    (completion,) = fkv.generate(model, [ids], params)
    logits = np.asarray(model(jnp.asarray([ids], jnp.int32))[0])
    return logits, list(completion.outputs[0].token_ids)


def _transformers(path: str) -> Any:
    """The model as transformers reads it; None without transformers, or if it cannot."""
    place = pathlib.Path(path).expanduser()
    try:
        import transformers
    except ImportError:
        return None
    # Of a folder only safetensors are read, here as by ours: a pickle could run code.
    folder, options = place, {"use_safetensors": True}
    if place.is_file():
        folder, options = place.parent, {"gguf_file": place.name}
    if place.is_dir() and not (place / "config.json").is_file():
        return None
    try:
        # A folder's own code is never run: what we write is computed by the package's file.
        if place.is_dir() and interop.is_own_format(place):
            from fusedkv_jax.interop.pytorch.modeling_fusedkv import FusedKVForCausalLM as Reader

            return Reader.from_pretrained(folder, use_safetensors=True).float().eval()
        reader = transformers.AutoModelForCausalLM
        return reader.from_pretrained(folder, trust_remote_code=False, **options).float().eval()
    except (ValueError, KeyError, ImportError):
        return None


def _theirs(model: Any, ids: list[int]) -> tuple[np.ndarray, list[int]]:
    import torch

    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = model(tokens).logits[0].numpy()
        written = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )
    return logits, written[0, len(ids) :].tolist()


def _print_table(rows: list[Document]) -> None:
    print(f"{'side':<24}  {'largest logit difference':>24}  {'same text':>9}")
    for row in rows:
        same = "yes" if row["same text"] else "NO"
        print(f"{row['side']:<24}  {row['largest logit difference']:>24.2e}  {same:>9}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
