"""The text of a study: a byte-level BPE vocabulary trained on it, its tokens, and other texts."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers as hf

from experiments.common.documents import Document
from experiments.common.preparation import Preparation, prepare
from experiments.study.claims import claim
from fusedkv_jax.data import Corpus, DataConfig, load_corpus, make_eval_batches, sources
from fusedkv_jax.data.packing import TokenizedDocuments
from fusedkv_jax.data.pipeline import fingerprint

END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Texts:
    """Files of JSON lines (`text`) or plain text, perhaps compressed.

    Attributes:
      train: what the vocabulary and the models are trained on.
      heldout: text of the same kind.
      others: further texts, by name, that the finished models are evaluated on.
    """

    train: pathlib.Path
    heldout: pathlib.Path
    others: dict[str, pathlib.Path]

    @classmethod
    def find(cls, folder: pathlib.Path) -> "Texts":
        """The texts of a folder: train.*, valid.* and NAME.valid.*.

        Raises:
          ValueError: the first or second is missing, or there are several.
        """
        others = {path.name.split(".")[0]: path for path in sorted(folder.glob("*.valid.*"))}
        return cls(_only(folder, "train.*"), _only(folder, "valid.*"), others)


def _only(folder: pathlib.Path, pattern: str) -> pathlib.Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"--data={folder} must hold one file {pattern}; there is {names}")
    return found[0]


def tokenize(texts: Texts, vocab_size: int, folder: pathlib.Path) -> Document:
    """Make `tokenizer.json` and `tokens/` in a folder unless they are there; one worker does it.

    Returns:
      What identifies both, for the records: equal for equal text, wherever it was made.

    Raises:
      ValueError: a text cannot be read, or the folder was made from other texts.
    """
    files = {"train": texts.train, "heldout": texts.heldout, **texts.others}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    done = folder / "corpus.json"
    with claim(folder / "claim", wait=True):
        if not done.is_file():
            _train_tokenizer(texts.train, vocab_size, folder / "tokenizer.json")
            if not (folder / "tokens").is_dir():
                _write_tokens(texts, folder)
            text = json.dumps({"bytes": sizes, "identity": _identity(folder, files)}, indent=1)
            partial = done.with_suffix(".partial")
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, done)
    made = json.loads(done.read_text(encoding="utf-8"))
    if made["bytes"] != sizes:
        raise ValueError(f"{folder} was made from other texts; remove it or use another --workdir")
    return made["identity"]


def _train_tokenizer(train: pathlib.Path, vocab_size: int, path: pathlib.Path) -> None:
    if path.is_file():
        return
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = sources.list_files([str(train)])
    documents = sources.read_all(files, text_key="text", errors="strict")
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    partial = path.with_suffix(".partial")
    tokenizer.save(str(partial))
    os.replace(partial, path)


def _write_tokens(texts: Texts, folder: pathlib.Path) -> None:
    prepare(
        Preparation(
            input=[str(texts.train)],
            heldout=[str(texts.heldout)],
            output_dir=str(folder / "tokens"),
            tokenizer=str(folder / "tokenizer.json"),
            num_shards=1,
            holdout_fraction=0.0,
        )
    )


def _identity(folder: pathlib.Path, files: dict[str, pathlib.Path]) -> Document:
    corpus = _load(folder)
    return {
        "tokenizer": corpus.tokenizer.fingerprint,
        "train": fingerprint(corpus.train),
        "train_tokens": int(corpus.train.lengths.sum()),  # type: ignore[union-attr]
        "train_bytes": int(corpus.train.num_bytes.sum()),  # type: ignore[union-attr]
        **{
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in files.items()
            if name != "train"
        },
    }


def _load(folder: pathlib.Path) -> Corpus:
    tokens, tokenizer = str(folder / "tokens"), str(folder / "tokenizer.json")
    return load_corpus(DataConfig(source=tokens, tokenizer=tokenizer, seq_len=1, batch_size=1))


def training(folder: pathlib.Path) -> TokenizedDocuments:
    """The training documents of a folder that `tokenize` has made."""
    documents = _load(folder).train
    assert isinstance(documents, TokenizedDocuments)
    return documents


def batches(text: pathlib.Path, config: DataConfig) -> Iterable[Mapping[str, Any]]:
    """All of a text as batches for evaluation, tokenised as a run's own text."""
    return make_eval_batches(dataclasses.replace(config, source=str(text), holdout_fraction=1.0))
