"""Tokenise text into ArrayRecord shards that training reads without holding them in memory.

    python -m experiments.prepare_data --input='corpus/*.jsonl.zst' --output_dir=tokens

The shards, described in `fusedkv_jax.data.shards`, appear in --output_dir all at once when the
last one is complete. Until then the work lies in a hidden folder beside it, where the same command
goes on after an interruption. Then train with `--config.data.source=tokens`.

--workers=N tokenises with N processes of this machine, --ray=auto on a Ray cluster, all of whose
nodes see the folders; neither changes a byte of the shards. On the way the tokens take their
room once more: two bytes each, four for vocabularies above 65536.
"""

import dataclasses
import sys
from typing import Any

from absl import flags

from experiments.common import cli
from experiments.common.preparation import Preparation, advice, prepare
from fusedkv_jax.data import shards

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines one flag for each field of `Preparation`."""
    flags.DEFINE_multi_string(
        "input",
        [],
        "Text to tokenise: a file, a glob or a folder of .txt, .md, .py, .jsonl (also .gz, "
        ".xz, .zst) or .parquet, or python_stdlib. May be given several times.",
    )
    flags.DEFINE_multi_string(
        "heldout",
        [],
        "Text of the same forms that is held out as a whole, beside what --holdout_fraction takes "
        "of the input (0 takes nothing). Files that --input names as well are not trained on. May "
        "be given several times.",
    )
    flags.DEFINE_string("output_dir", None, "Folder for the shards; it must be empty or new.")
    flags.DEFINE_string("tokenizer", "byte", "byte, or the path of a tokenizer.json.")
    flags.DEFINE_string("text_key", "text", "JSON field or Parquet column that holds the text.")
    flags.DEFINE_integer("num_shards", 8, "Files that the training split is divided into.")
    flags.DEFINE_float(
        "holdout_fraction", 0.01, "Expected share of the documents in the held-out split."
    )
    flags.DEFINE_integer("max_documents", None, "Stop after so many documents.")
    flags.DEFINE_integer(
        "max_document_mib", 64, "The largest document, in MiB of text; larger ones are refused."
    )
    flags.DEFINE_enum(
        "errors",
        "strict",
        ["strict", "replace"],
        "What to do with bytes that are not UTF-8: stop, or put U+FFFD in their place.",
    )
    flags.DEFINE_integer(
        "workers", 1, "Processes that tokenise and write shards; 1 is this process alone."
    )
    flags.DEFINE_string(
        "ray",
        None,
        "Work on Ray: auto for the cluster of this machine or of RAY_ADDRESS, local for one that "
        "is started here, or an address. A worker takes whole files.",
    )
    cli.only_with("workers max_documents", ray=False)


def main() -> None:
    """Prepares what the flags say and prints what came of it."""
    cli.require("output_dir")
    names = [field.name for field in dataclasses.fields(Preparation)]
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    settings = Preparation(**values)
    if not settings.input:
        raise ValueError("--input is missing; name a file, a glob or a folder of text")
    try:
        metadata = prepare(settings)
    except KeyboardInterrupt:
        print("what is tokenised is kept; the same command goes on", file=sys.stderr)
        raise
    for split in shards.SPLITS:
        counts = metadata[split]
        ratio = f", {counts['bytes'] / counts['tokens']:.2f} bytes each" if counts["tokens"] else ""
        print(f"{split}: {counts['documents']} documents, {counts['tokens']} tokens{ratio}")
    print(f"wrote {settings.output_dir}; {advice(settings, metadata)}")


# Not at import: other binaries have flags of the same names, and tests import several.
if __name__ == "__main__":
    define_flags()
    cli.run(main)
