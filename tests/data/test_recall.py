"""Recall tasks: programs that read only the tokens find the answers that the tasks state."""

import string

import numpy as np
import pytest
import tokenizers as hf

from fusedkv_jax import data
from fusedkv_jax.data import recall_tasks, tokenizers
from fusedkv_jax.data.recall import RecallSequences
from fusedkv_jax.data.recall_forms import TextForm, TokenForm

TASKS = recall_tasks.names()
LOOKUPS = [task for task in TASKS if task != "variable_tracking"]


def answers_of(tokens, marks):
    """The stated answers in order, each a tuple of tokens."""
    return [tuple(tokens[marks == number].tolist()) for number in range(1, marks.max() + 1)]


def solve_tokens(task, tokens, start, marks):
    """Answers by looking at the haystack alone, given the questions."""
    haystack, tail = tokens[:start].tolist(), tokens[start:].tolist()
    # A name in a chain stands twice, and the later place is where it is handed on.
    after = dict(zip(haystack[:-1], haystack[1:], strict=True))
    assert tail[0] == TokenForm.ASK
    if task == "variable_tracking":
        found = []
        for token in tail[1 :: 1 + recall_tasks.HOPS]:
            for _ in range(recall_tasks.HOPS):
                token = after[token]
                found.append((token,))
        return found
    return [(after[key],) for key in tail[1::2]]


@pytest.mark.parametrize("length", [64, 200])
@pytest.mark.parametrize("task", TASKS)
def test_token_form_is_solved_by_a_program(task, length):
    examples = recall_tasks.make(task, TokenForm(258), length=length, count=20, seed=5)
    assert examples.tokens.shape == (20, length)
    assert examples.tokens.min() >= 0 and examples.tokens.max() < 258
    for tokens, start, marks in zip(
        examples.tokens, examples.context, examples.answers, strict=True
    ):
        assert not marks[:start].any()
        assert solve_tokens(task, tokens, start, marks) == answers_of(tokens, marks)


def test_number_of_facts_and_questions():
    form = TokenForm(3 * 500 + 1)
    keys, values = range(1, 501), range(501, 1001)
    expected = {
        "single_needle": (1, 1),
        "multi_needle": (8, 8),
        "multi_key": (100, 1),
        "multi_query": (100, 8),
        "variable_tracking": (16, 16),
        "kv_recall": (90, 32),
    }
    for task, (facts, asked) in expected.items():
        tokens, start, marks = recall_tasks.example(task, form, 400, np.random.default_rng(0))
        assert marks.max() == asked, task
        found = sum(token in values for token in tokens[:start])
        names = sum(token in keys for token in tokens[:start])
        # A copy is two names; a chain has one value.
        counts = (4, 4 + 2 * 12) if task == "variable_tracking" else (facts, facts)
        assert (found, names) == counts, task


def test_needles_lie_anywhere():
    examples = recall_tasks.make("single_needle", TokenForm(64), length=64, count=400)
    keys = np.arange(1, 22)
    places = np.isin(examples.tokens[:, :61], keys).argmax(axis=1)
    # 60 places, from the first to the last, and none preferred: the mean is that of a uniform one.
    assert places.min() == 0 and places.max() == 59
    assert abs(places.mean() - 29.5) < 4 * 17.3 / np.sqrt(400)


@pytest.mark.parametrize("task", TASKS)
def test_text_form_is_solved_by_reading(task):
    tokenizer = tokenizers.load("byte")
    examples = recall_tasks.make(task, TextForm(tokenizer), length=2000, count=3, seed=1)
    for tokens, start, marks in zip(
        examples.tokens, examples.context, examples.answers, strict=True
    ):
        text = tokens.tolist()
        haystack, tail = tokenizer.decode(text[:start]), tokenizer.decode(text[start:])
        stated = [tokenizer.decode(answer).strip() for answer in answers_of(tokens, marks)]
        if task == "variable_tracking":
            found = []
            for part in tail.split("number ")[1:]:
                name = haystack.split(f"The number {part[:5]} is that of ")[1].split(".")[0]
                found.append(name)
                while (sentence := f"The number of {name} is also that of ") in haystack:
                    name = haystack.split(sentence)[1].split(".")[0]
                    found.append(name)
        else:
            names = [part.split(" is")[0] for part in tail.split("The number of ")[1:]]
            found = [haystack.split(f"The number of {name} is ")[1][:5] for name in names]
        assert found == stated


def word_pieces(prepends: str) -> hf.Tokenizer:
    """Words with a mark for the space before them, of which every text gets one; the first key and
    value are few tokens, and digits join with a full stop."""
    tokenizer = hf.Tokenizer(hf.models.BPE(unk_token="<unk>"))
    texts = ["The number of bababa is 10000. The number 10000 is 1. 2. 3. 4. 5. 6. 7. 8. 9."] * 9
    alphabet = [*string.ascii_letters, *string.digits, *".,\n▁"]
    trainer = hf.trainers.BpeTrainer(
        vocab_size=110,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = hf.decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(texts, trainer)
    if prepends == "normalizer":  # as of Llama 2: a text that begins with a space gets another
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = hf.normalizers.Sequence(
            [hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")]
        )
    return tokenizer


@pytest.fixture(scope="module", params=["normalizer", "pre-tokenizer"])
def pieces(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.json"
    word_pieces(request.param).save(str(path))
    return tokenizers.load(str(path))


def copied(form, tokens, start, marks):
    """For each question, what follows its tokens in the haystack, as many as the answer has."""
    haystack, tail = tokens[:start].tolist(), tokens[start:].tolist()
    marks, begin, found = marks[start:], len(form.ask()), []
    for number in range(1, marks.max() + 1):
        (places,) = np.flatnonzero(marks == number)[None]
        question = tail[begin : places[0]]
        begin = places[-1] + 1
        size = len(question)
        (after,) = [i + size for i in range(len(haystack)) if haystack[i : i + size] == question]
        found.append(tuple(haystack[after : after + len(places)]))
    return found


@pytest.mark.parametrize("task", LOOKUPS)
def test_who_copies_is_right_whatever_the_tokenizer(task, pieces):
    form = TextForm(pieces)
    examples = recall_tasks.make(task, form, length=1200, count=4, seed=2)
    for tokens, start, marks in zip(
        examples.tokens, examples.context, examples.answers, strict=True
    ):
        assert copied(form, tokens, start, marks) == answers_of(tokens, marks)


def test_the_text_of_pieces_is_theirs(pieces):
    """No space more, wherever a piece begins."""
    found, spelled, x = TextForm(pieces), TextForm(tokenizers.load("byte")), pieces.encode("x")
    for name, numbers in {
        "fact": (5, 777),
        "copy": (5, 9),
        "start": (5, 777),
        "question": (5,),
        "trace": (777,),
        "value": (777,),
        "name": (5,),
        "ask": (),
    }.items():
        ids, plain = (getattr(form, name)(*numbers) for form in (found, spelled))
        assert pieces.decode([*x, *ids]) == "x" + bytes(plain).decode(), name
    period = len(pieces.encode("x" + TextForm._NOISE)) - len(x)
    twice = found.noise(np.random.default_rng(0), 2 * period).tolist()
    assert pieces.decode([*x, *twice]) == "x" + 2 * TextForm._NOISE


@pytest.mark.parametrize("length", [256, 512, 768])
def test_facts_of_any_length_are_as_many_as_fit(length, pieces):
    form = TextForm(pieces)
    first = form.fact(0, 0)
    assert len(first) < len(form.fact(40_000, 76_543))
    examples = recall_tasks.make("kv_recall", form, length=length, count=12, seed=3)
    again = recall_tasks.make("kv_recall", form, length=length, count=12, seed=3)
    assert (examples.tokens == again.tokens).all()
    most = int(0.45 * length) // len(first)
    counts = examples.answers.max(axis=1)
    assert counts.min() >= 1 and (counts < most).any()
    for tokens, start, marks in zip(
        examples.tokens, examples.context, examples.answers, strict=True
    ):
        assert copied(form, tokens, start, marks) == answers_of(tokens, marks)
        # Another fact and question, of 32 characters at most, might not have fitted.
        asked, count = length - start - len(form.ask()), marks.max()
        told = asked + count * len(pieces.encode("x. ")[len(pieces.encode("x")) :])
        assert start - told < 64 or count == most


def test_the_same_seed_makes_the_same_examples():
    def tokens(**changes):
        settings = {"length": 64, "count": 2, "seed": 0} | changes
        return recall_tasks.make("kv_recall", TokenForm(258), **settings).tokens

    assert (tokens() == tokens()).all()
    assert (tokens(count=1) == tokens()[:1]).all()
    assert (tokens(seed=1) != tokens()).any()
    assert (tokens()[0] != tokens()[1]).any()


def test_mistakes():
    with pytest.raises(ValueError, match="task=multi_keys is unknown; did you mean multi_key"):
        recall_tasks.make("multi_keys", TokenForm(258), length=64, count=1)
    with pytest.raises(ValueError, match="length=20 is too short for multi_needle, which needs 33"):
        recall_tasks.make("multi_needle", TokenForm(258), length=20, count=1)
    for wrong in ({"count": 0}, {"length": -3}, {"seed": -1}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value}; use a whole number of at least"):
            recall_tasks.make(
                "kv_recall", TokenForm(258), **{"length": 64, "count": 1, "seed": 0} | wrong
            )
    with pytest.raises(ValueError, match="vocab_size=48 is too small"):
        TokenForm(48)
    with pytest.raises(ValueError, match="seq_len=15 is too short for recall; use 16"):
        RecallSequences("train", vocab_size=258, seq_len=15, seed=0)
    # The smallest vocabulary and length that training may ask for.
    for task in TASKS:
        recall_tasks.make(task, TokenForm(49), length=64, count=1)


def test_training_sequences_hold_whole_examples_and_only_answers_count():
    sequences = RecallSequences("train", vocab_size=258, seq_len=256, seed=0)
    sizes, repeats = set(), 0
    for index in range(40):
        row = sequences[index]
        counted = row["loss_mask"] > 0
        assert counted.any()
        for segment in range(1, row["segment_ids"].max() + 1):
            here = np.flatnonzero(row["segment_ids"] == segment)
            sizes.add(len(here))
            tokens, targets = row["tokens"][here], row["targets"][here]
            assert (row["positions"][here] == np.arange(len(here))).all()
            assert (targets[:-1] == tokens[1:]).all()
            known = np.flatnonzero(counted[here])
            if TokenForm.ASK not in tokens:  # one repeated period
                period = known.min() + 1
                assert period <= len(here) // 2
                assert (known == np.arange(period - 1, len(here) - 1)).all()
                assert (targets[known] == np.resize(tokens[:period], len(here))[known + 1]).all()
                repeats += 1
                continue
            asked = tokens.tolist().index(TokenForm.ASK)
            assert known.min() > asked
            # Each answer is the token after an earlier place of the token that asks for it.
            for place in known:
                before = tokens[:asked].tolist()
                found = [before[i + 1] for i, t in enumerate(before[:-1]) if t == tokens[place]]
                assert targets[place] == found[-1]
    assert sizes == {16, 32, 64, 128, 256}
    assert repeats > 20


def test_recall_is_a_source_of_the_pipeline():
    config = data.DataConfig(source="recall", seq_len=64, batch_size=2, num_threads=0)
    first, again = (next(data.make_train_iterator(config)) for _ in range(2))
    assert all((first[key] == again[key]).all() for key in first)
    heldout = list(data.make_eval_batches(config, 2))
    assert len(heldout) == 2
    assert heldout[0]["num_bytes"] == heldout[0]["loss_mask"].sum() > 0
    rows = {row.tobytes() for row in first["tokens"]}
    assert not rows & {row.tobytes() for batch in heldout for row in batch["tokens"]}
