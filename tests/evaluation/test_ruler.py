"""RULER's tasks: what the samples hold, how long they are, how texts are scored."""

import dataclasses
import json
import re
import time

import numpy as np
import pytest
from flax import nnx

from fusedkv_jax.data.tokenizers import ByteTokenizer
from fusedkv_jax.evaluation import Method, evaluate_case, longcontext, ruler, ruler_case
from fusedkv_jax.evaluation.longcontext_cases import LongContextSettings
from fusedkv_jax.evaluation.ruler.story import Draw, most_units
from tests.model import small

BYTES = ByteTokenizer()
LENGTH = 8192
ESSAY = " ".join(f"Point {i} was made. Who would doubt number {i}?" for i in range(200))
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"The hall of town {town} seats {town}{part} people.",
                    "qas": [
                        {
                            "question": f"How many does hall {part} of {town} seat?",
                            "answers": [
                                {"text": f"{town}{part}"},
                                {"text": f"{town}{part} people"},
                            ],
                            "is_impossible": False,
                        },
                        {"question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
                for part in range(3)
            ]
        }
        for town in range(10, 20)
    ]
}
HOTPOT = [
    {
        "question": f"Where was person {i} born?",
        "answer": f"Town-{i}",
        "context": [[f"Person {i}", ["Was born", f" in Town-{i}."]], [f"Other {i}", ["No one."]]],
    }
    for i in range(6)
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ruler")
    contents = {
        "essays": ("essay.txt", ESSAY),
        "squad": ("squad.json", json.dumps(SQUAD)),
        "hotpotqa": ("hotpot.json", json.dumps(HOTPOT)),
    }
    for name, text in contents.values():
        (folder / name).write_text(text)
    return {key: str(folder / name) for key, (name, _) in contents.items()}


@pytest.fixture(scope="module")
def material(paths):
    return ruler.load_material(tuple(ruler.TASKS), **paths)


@pytest.fixture(scope="module")
def samples(material):
    return {
        task: ruler.make(task, BYTES, length=LENGTH, count=3, seed=7, material=material)
        for task in ruler.TASKS
    }


def test_the_official_names_and_tokens():
    niah = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3")
    names = [*(f"niah_{name}" for name in (*niah, "multivalue", "multiquery")), "vt", "cwe", "fwe"]
    assert list(ruler.TASKS) == [*names, "qa_1", "qa_2"]
    assert [task.tokens for task in ruler.TASKS.values()] == [128] * 8 + [30, 120, 50, 32, 32]
    assert ruler.expand(["text", "ruler", "vt"]) == ("text", *ruler.TASKS)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_lengths_are_reached_and_never_exceeded(task, samples, material):
    found, room = ruler.TASKS[task], LENGTH - ruler.TASKS[task].tokens
    for number, sample in enumerate(samples[task]):
        assert sample.tokens.tolist() == [BYTES.bos_id, *sample.prompt.encode()]
        key = (7, list(ruler.TASKS).index(task), LENGTH, number)
        draw = Draw(np.random.default_rng(key), number, 7, LENGTH, material)
        more = found.begin(draw).prompt(sample.units + 1)
        assert len(sample.tokens) <= room < 1 + len(more.encode())
    assert len({sample.prompt for sample in samples[task]}) == 3
    again = ruler.make(task, BYTES, length=LENGTH, count=2, seed=7, material=material)
    assert [s.prompt for s in again] == [s.prompt for s in samples[task][:2]]
    with pytest.raises(ValueError, match=f"length=200 is too short for {task}"):
        ruler.make(task, BYTES, length=200, count=1, material=material)


def times(text, word):
    return len(re.findall(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text))


@pytest.mark.parametrize("task", [name for name in ruler.TASKS if name.startswith("niah")])
def test_each_needle_is_there_once(task, samples):
    needles = re.compile(r"The secret (number|uuid) of ([\w-]+) is ([\w-]+)\.")
    count = {"niah_multivalue": 4, "niah_multiquery": 4}.get(task, 1)
    told = {"niah_multikey_1": 4}.get(task, count)
    for sample in samples[task]:
        question = sample.prompt.rsplit("\n", 1)[1]
        facts = [match[1:] for match in needles.findall(sample.prompt)]
        expected = told + sample.units if "_multikey_2" in task or "_multikey_3" in task else told
        assert len(facts) == len(set(facts)) == expected
        assert len(sample.answers) == count
        for answer in sample.answers:
            ((key, _),) = [fact for fact in facts if fact[1] == answer]
            assert times(sample.prompt, answer) == 1 and times(question, key) == 2
        asked = {key for key, _ in facts if times(question, key)}
        assert sorted(value for key, value in facts if key in asked) == sorted(sample.answers)
        assert sample.reply == " " + ", ".join(sample.answers)
        uuids = task in ("niah_single_3", "niah_multikey_3")
        form = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if uuids else r"\d{7}"
        assert all(re.fullmatch(form, answer) for answer in sample.answers)


def test_variables_follow_from_the_value(samples):
    for sample in samples["vt"]:
        own = sample.prompt.split("\n\n", 3)[-1]  # after the solved example
        value = re.findall(r"have the value (\d{5})\?", own)[0]
        assignments = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", own)
        held = {}
        for name, source in assignments:  # in the order of the text
            held[name] = held.get(source, source)
        assert [name for name in held if held[name] == value] == list(sample.answers)
        assert len(assignments) == 5 and own.count("The grass is green") == sample.units
        assert value not in sample.prompt.replace(own, "")


def test_common_and_frequent_words_are(samples):
    for sample in samples["cwe"]:
        listed = re.findall(r"\d+\. ([\w-]+)", sample.prompt.split("\n\n")[1])
        words, counts = np.unique(listed, return_counts=True)
        found = dict(zip(words.tolist(), counts.tolist(), strict=True))
        assert {found.pop(answer) for answer in sample.answers} == {30}
        assert set(found.values()) == {3} and len(found) == sample.units
        solved = re.findall(r"\d+\. ([\w-]+)", sample.prompt.split("\n\n")[0])
        assert len(set(solved)) == 40 and not {*solved} & {*words.tolist()}
    for sample in samples["fwe"]:
        text = sample.prompt.split("\n")[1].split()
        words, counts = np.unique([word for word in text if word != "..."], return_counts=True)
        order = np.argsort(-counts)
        assert words[order[:3]].tolist() == list(sample.answers)
        # The k-th word has 1 / k^2 of what the first, the dots, would have by zeta's series.
        for rank in (2, 3, 4):
            assert counts[order[rank - 2]] == int(sample.units / rank**2 / (np.pi**2 / 6))
        assert counts[order[2]] > counts[order[3]]


def test_questions_have_their_documents(samples, material):
    asked = set()
    for sample in samples["qa_1"]:
        ((part, town),) = set(re.findall(r"hall (\d) of (\d+)", sample.prompt))
        assert sample.answers == (f"{town}{part}", f"{town}{part} people")
        assert sample.units > 30 and sample.prompt.count("Document ") == sample.units
        assert f"seats {town}{part} people" in sample.prompt
        asked.add((town, part))
    assert len(asked) == 3
    for sample in samples["qa_2"]:
        assert f"in {sample.answers[0]}." in sample.prompt
    # Documents of the same article come first, and the right one always.
    story = ruler.TASKS["qa_1"].begin(Draw(np.random.default_rng(0), 0, 0, LENGTH, material))
    town = story.answers[0][:2]
    assert story.prompt(3).count(f"town {town} seats") == 3
    assert f"seats {story.answers[0]} people" in story.prompt(1)


def test_a_sample_of_128k_is_made_in_a_moment(material):
    start = time.process_time()
    lengths = {
        task: len(ruler.make(task, BYTES, length=2**17, count=1, material=material)[0].tokens)
        for task in ("niah_single_2", "niah_multikey_3", "cwe", "fwe")
    }
    assert time.process_time() - start < 20
    for task, length in lengths.items():
        assert 0 <= 2**17 - ruler.TASKS[task].tokens - length < 300


@pytest.mark.parametrize(
    "size", [lambda n: 10 + 3 * n, lambda n: 10 + n * n // 7, lambda n: 40 + n % 2 + n]
)
def test_the_search_finds_the_largest(size):
    calls = []
    found = most_units(lambda n: calls.append(n) or size(n), 100_000, 1)
    assert size(found) <= 100_000 < size(found + 1) and len(calls) < 40
    assert size(most_units(size, size(1), 1)) == size(1)
    with pytest.raises(ValueError, match="room for 9"):
        most_units(size, 9, 1)


def test_scores():
    every, part = ruler.string_match_all, ruler.string_match_part
    assert every("It is 123 and ABC", ["123", "abc", "x", "y"]) == 0.5
    assert every("12 3", ["123"]) == 0 and every("91234", ["123"]) == 1  # any place
    assert part("in paris.", ["Rome", "Paris"]) == 1 and part("", ["Rome"]) == 0
    assert [ruler.TASKS[name].score for name in ("vt", "qa_1")] == [every, part]


def test_files_that_are_missing_or_something_else(paths, tmp_path):
    with pytest.raises(ValueError, match="question=after: vt asks inside the prompt"):
        LongContextSettings(tasks=("vt",), question="after")
    with pytest.raises(ValueError, match="task niah_single_2 needs --essays"):
        LongContextSettings(tasks=("ruler",))
    for task, flag in (("niah_single_2", "essays"), ("qa_1", "squad"), ("qa_2", "hotpotqa")):
        with pytest.raises(ValueError, match=f"task {task} needs --{flag}"):
            ruler.load_material([task], **{**paths, flag: None})
    for content in ("[", "{}", '{"data": 3}', '{"data": []}', "[1]", '[{"context": [["a"]]}]'):
        (tmp_path / "x.json").write_text(content)
        for task, flag in (("qa_1", "squad"), ("qa_2", "hotpotqa")):
            with pytest.raises(ValueError, match="x.json is not .*JSON file: .") as error:
                ruler.load_material([task], **{flag: str(tmp_path / "x.json")})
            assert "\n" not in str(error.value)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="has no words"):
        ruler.load_material(["niah_single_2"], essays=str(tmp_path / "empty.txt"))


def test_tasks_that_cannot_be_made(material):
    for make in (ruler.make, ruler_case):
        with pytest.raises(ValueError, match="task=niah_single is unknown; did you mean niah_sing"):
            make("niah_single", BYTES, length=1024, count=1)
        for task, name in (("niah_single_2", "essays"), ("qa_1", "squad"), ("qa_2", "hotpotqa")):
            without = dataclasses.replace(material, **{name: () if name == "essays" else None})
            for given in (None, without):
                with pytest.raises(ValueError, match=f"task {task} needs --{name}, .*; or leave"):
                    make(task, BYTES, length=1024, count=1, material=given)
        for wrong in ({"count": 0}, {"length": -3}, {"seed": -1}):
            ((name, value),) = wrong.items()
            with pytest.raises(ValueError, match=f"{name}={value}; use a whole number of at least"):
                make("vt", BYTES, **{"length": 2048, "count": 1, "seed": 0} | wrong)
    with pytest.raises(ValueError, match="task=niah_single is unknown; did you mean"):
        ruler.load_material(["niah_single"])


@pytest.mark.parametrize(("task", "flag"), [("qa_1", "squad"), ("qa_2", "hotpotqa")])
def test_files_that_cannot_be_read(task, flag, tmp_path):
    (tmp_path / "train.json").touch()
    near, missing = tmp_path / "trian.json", tmp_path / "missing" / "x.json"
    for place, message in (
        (near, f"no such file or folder {str(near)!r}; did you mean train.json?"),
        (missing, f"no such file or folder {str(missing)!r}; name "),
        (tmp_path, f"{tmp_path} cannot be read (Is a directory); name "),
    ):
        with pytest.raises(ValueError) as error:
            ruler.load_material([task], **{flag: str(place)})
        assert str(error.value).startswith(message)


def test_blank_answers_are_none(tmp_path):
    """Every text contains a blank one."""

    def read(task, flag, content):
        (tmp_path / "x.json").write_text(json.dumps(content))
        return getattr(ruler.load_material([task], **{flag: str(tmp_path / "x.json")}), flag)

    def squad(*answers):
        asked = {"question": "Who?", "answers": [{"text": answer} for answer in answers]}
        return {"data": [{"paragraphs": [{"context": "It was you.", "qas": [asked]}]}]}

    assert read("qa_1", "squad", squad("", "you", " \n")).questions[0].answers == ("you",)
    for blank in ("", " \n"):
        with pytest.raises(ValueError, match="not SQuAD's .*: questions without answers"):
            read("qa_1", "squad", squad(blank))
        with pytest.raises(ValueError, match="not HotpotQA's .*: questions without answers"):
            read("qa_2", "hotpotqa", [*HOTPOT, {**HOTPOT[0], "answer": blank}])


def test_tokens_that_only_the_model_has_are_no_text(material):
    """It has more rows than the tokenizer has ids, and writes some of them."""
    case = ruler_case("qa_1", BYTES, length=400, count=2, seed=1, material=material)
    assert case.writing
    right = case.parts.tokens[0]
    beyond = np.insert(right, [0, 2], [BYTES.vocab_size, 599])
    assert case.writing.score(0, beyond) == case.writing.score(0, right) == 1
    written, score = [], case.writing.score

    def watched(row, tokens):
        written.append(tokens)
        return score(row, tokens)

    case = dataclasses.replace(case, writing=dataclasses.replace(case.writing, score=watched))
    config = small.config("mha", vocab_size=600, max_length=400, num_layers=2)
    found = evaluate_case(small.decoder(config), case, [Method("whole cache")])["whole cache"]
    assert found.accuracy == 0 and np.max(written) >= BYTES.vocab_size


def test_what_a_model_writes_is_scored(monkeypatch, material):
    """Against the full forward pass, a row at a time."""
    monkeypatch.setattr(longcontext, "_TOKENS_AT_ONCE", 1)
    config = small.config("mha", vocab_size=BYTES.vocab_size, max_length=400, num_layers=2)
    model = small.decoder(config)
    case = ruler_case("qa_1", BYTES, length=400, count=3, seed=1, material=material)
    assert case.parts.prompts.shape == (3, 368) and case.parts.tokens.shape == (3, 32)
    assert case.writing
    seen, score = {}, case.writing.score

    def watched(row, tokens):
        seen[row] = tokens
        return [1.0, 0.0, 0.5][row]

    case = dataclasses.replace(case, writing=dataclasses.replace(case.writing, score=watched))
    found = evaluate_case(model, case, [Method("whole cache")])["whole cache"]
    assert (found.accuracy, found.kl, found.top1, found.bytes_ratio) == (0.5, 0, 1, 1)
    texts = np.pad(case.parts.prompts, ((0, 0), (0, 32)))
    for row, length in enumerate(case.parts.lengths):
        texts[row, length : length + 32] = seen[row]
    likeliest = np.asarray(nnx.jit(lambda model, texts: model(texts))(model, texts).argmax(-1))
    for row, length in enumerate(case.parts.lengths):
        assert seen[row].tolist() == likeliest[row, length - 1 : length + 31].tolist()
    right = case.parts.tokens.copy()
    right[0, case.parts.counts[0]] = BYTES.eos_id
    right[1, 0] = BYTES.eos_id  # nothing after the end of the text counts
    assert [score(0, right[0]), score(1, right[1])] == [1, 0]
