"""Bytes and tokenizer.json files: ids, round trips, special tokens, and what is refused."""

import hashlib
import json

import numpy as np
import pytest
import tokenizers as hf

from fusedkv_jax.data import tokenizers

TEXT = "def f(x):\n    return 'ä 日本 🙂'  # </s> is text\n"


def train_bpe(path, special=("<s>", "</s>", "<pad>"), pad=True):
    """Writes a byte-level BPE with truncation, padding and a template, as many files have."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 5, "the theme of the thesis"], trainer)
    tokenizer.enable_truncation(4)
    if pad:
        tokenizer.enable_padding(length=64)
        tokenizer.post_processor = hf.processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
        )
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


def test_byte_ids_are_the_bytes():
    tokenizer = tokenizers.load("byte")
    assert tokenizer.encode("aä") == [97, 0xC3, 0xA4]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, None)
    assert tokenizer.vocab_size == 258
    assert tokenizer.decode([256, 97, 0xC3, 0xA4, 0xC3, 257]) == "aä\ufffd"
    assert tokenizer.decode_bytes([256, 0xFF, 0, 257]) == b"\xff\x00"


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_round_trip_and_batch(name, bpe):
    tokenizer = tokenizers.load(str(bpe) if name == "bpe" else name)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == TEXT
    batch = tokenizer.encode_batch([TEXT, "", "x"])
    assert [array.dtype for array in batch] == [np.int32] * 3
    assert [array.tolist() for array in batch] == [ids, [], tokenizer.encode("x")]


def test_hugging_face_ids_are_those_of_the_text_alone(bpe):
    tokenizer = tokenizers.load(str(bpe))
    raw = hf.Tokenizer.from_file(str(bpe))
    raw.no_truncation()
    raw.no_padding()
    assert tokenizer.encode("the thesis") == raw.encode("the thesis").ids[1:]
    assert tokenizer.vocab_size == raw.get_vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.fingerprint == hashlib.sha256(bpe.read_bytes()).hexdigest()


def test_text_cannot_end_its_document_unless_allowed_to(bpe):
    tokenizer = tokenizers.load(str(bpe))
    assert tokenizer.eos_id not in tokenizer.encode("a</s>b")
    assert tokenizer.eos_id not in tokenizer.encode_batch(["a</s>b"])[0]
    assert tokenizer.encode("a</s>b", allow_special=True)[1] == tokenizer.eos_id
    assert tokenizer.eos_id not in tokenizer.encode("a</s>b")


def test_a_folder_and_its_tokenizer_config_name_the_special_tokens(tmp_path):
    train_bpe(tmp_path / "tokenizer.json", special=("<a>", "<|im_end|>"), pad=False)
    with pytest.raises(ValueError, match="no end-of-text token found; name it as eos_token in a"):
        tokenizers.load(str(tmp_path))
    config = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizers.load(str(tmp_path))
    # Without a token of its own for the beginning, the one for the end stands there.
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 1, None)


def test_a_token_that_is_named_null_is_missing(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(bpe.read_bytes())
    config = {"bos_token": None, "eos_token": None, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizers.load(str(tmp_path))
    # The vocabulary has "<s>" and "<pad>"; documents need an end, so "</s>" is taken for it.
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 1, None)


def test_vocab_size_covers_ids_with_gaps(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = hf.Tokenizer(hf.models.WordLevel({"a": 0, "</s>": 900}, unk_token="a"))
    tokenizer.save(str(path))
    assert tokenizers.load(str(path)).vocab_size == 901


@pytest.mark.parametrize("data", ["{", '{"version": "1.0"}', "\x00"])
def test_files_that_are_not_tokenizers(tmp_path, data):
    path = tmp_path / "tokenizer.json"
    path.write_text(data)
    with pytest.raises(ValueError) as error:
        tokenizers.load(str(path))
    assert str(error.value).startswith(f"{path}: not a tokenizer.json: ")
    assert "\n" not in str(error.value)


def test_missing_file():
    with pytest.raises(FileNotFoundError) as error:
        tokenizers.load("bite")
    assert str(error.value) == "no such tokenizer: 'bite'; it is 'byte' or a tokenizer.json"


@pytest.mark.parametrize("token", [-1, 258])
def test_ids_outside_the_vocabulary(token):
    with pytest.raises(ValueError) as error:
        tokenizers.load("byte").decode([97, token])
    assert str(error.value) == (
        f"token id {token} is outside the vocabulary of 258 of tokenizer 'byte'"
    )


def test_check_vocab_size():
    tokenizers.check_vocab_size(tokenizers.load("byte"), 258)
    with pytest.raises(ValueError, match="ids up to 257, outside the model's vocabulary of 257"):
        tokenizers.check_vocab_size(tokenizers.load("byte"), 257)


def test_special_tokens_by_their_texts(bpe):
    assert tokenizers.load(str(bpe)).special_tokens == {"<s>": 0, "</s>": 1, "<pad>": 2}
    assert tokenizers.load("byte").special_tokens == {}
