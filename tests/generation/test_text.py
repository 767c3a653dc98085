"""Text of tokens as they come: what is handed out is whole, final, and all there is."""

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given
from hypothesis import strategies as st

from fusedkv_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from fusedkv_jax.generation.text import Detokenizer, StopTexts

SCRIPTS = st.sampled_from(list("ab é ß\n日本語한국🙂👩‍👩‍👧🇩🇪\u0301\u200d"))
TEXTS = st.text(SCRIPTS, max_size=40)


def cut(sequence, places):
    """The sequence in pieces, cut at places (taken modulo its length)."""
    bounds = sorted({0, len(sequence), *(place % (len(sequence) + 1) for place in places)})
    return [sequence[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


CUTS = st.lists(st.integers(0, 200), max_size=30)


def streamed(tokenizer, ids, places):
    detokenizer = Detokenizer(tokenizer.decode)
    pieces = [detokenizer.push(part) for part in cut(ids, places)]
    return [*pieces, detokenizer.flush()]


@given(TEXTS, CUTS)
def test_bytes_of_any_script_in_any_pieces(text, places):
    pieces = streamed(ByteTokenizer(), list(text.encode()), places)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


@given(st.binary(max_size=30), CUTS)
def test_bytes_that_are_not_text(data, places):
    pieces = streamed(ByteTokenizer(), list(data), places)
    assert "".join(pieces) == data.decode("utf-8", "replace")


def test_a_character_comes_with_its_last_byte():
    detokenizer = Detokenizer(ByteTokenizer().decode)
    found = [detokenizer.push([byte]) for byte in "a🙂é".encode()]
    assert found == ["a", "", "", "", "🙂", "", "é"]


def byte_level(path):
    """A byte-level BPE, as of GPT-2, with merges inside of characters."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["日本語 日本 🙂🙂 the theme"] * 5, trainer)
    tokenizer.save(str(path))


def byte_fallback(path):
    """Words with a mark for the space before them, bytes for what is unknown, as of Llama."""
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a"]
    tokenizer = hf.Tokenizer(
        hf.models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = hf.decoders.Sequence(
        [
            hf.decoders.Replace("▁", " "),
            hf.decoders.ByteFallback(),
            hf.decoders.Fuse(),
            hf.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.save(str(path))


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param.__name__) / "tokenizer.json"
    request.param(path)
    return HuggingFaceTokenizer(path)


def test_hugging_face_tokenizers(tokenizer):
    rng = np.random.default_rng(0)
    letters = list("ab é ß日本語🙂👩‍👧🇩🇪 ")
    for _ in range(150):
        text = "".join(rng.choice(letters, rng.integers(0, 25)))
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids, rng.integers(0, 99, rng.integers(0, 30)).tolist())
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert not any("\ufffd" in piece for piece in pieces)


def shown_up_to_the_first(text, stops, include):
    """The definition, character by character."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


FEW = st.text(st.sampled_from("ab🙂"), max_size=24)
STOPS = st.lists(st.text(st.sampled_from("ab🙂"), min_size=1, max_size=5), max_size=4)


@given(FEW, STOPS, CUTS, st.booleans())
def test_stop_texts_in_any_pieces(text, stops, places, include):
    expected, found = shown_up_to_the_first(text, stops, include)
    search, shown = StopTexts(stops, include), ""
    for piece in cut(text, places):
        shown += search.push(piece)
        assert expected.startswith(shown)  # nothing beyond, ever: no part of a stop text leaks
        if search.found:
            break
    if search.found is None:
        shown += search.flush()
    assert (shown, search.found) == (expected, found)


def test_only_what_may_begin_a_stop_text_is_held_back():
    search = StopTexts(["END", "EE"])
    found = [search.push(piece) for piece in ["xE", "N", "x", "E", "END"]]
    assert found == ["x", "", "ENx", "", ""] and search.found == "EE"


def test_a_stop_text_within_the_first_tokens_does_not_stop():
    search = StopTexts(["ab"])
    assert search.push("xab", armed=False) == "xab"
    assert search.push("cab") == "c" and search.found == "ab"
    # One that begins there and ends later does.
    search = StopTexts(["ab"])
    assert search.push("xa", armed=False) == "x"
    assert search.push("b") == "" and search.found == "ab"
