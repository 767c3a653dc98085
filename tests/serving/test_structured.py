"""Outputs that are held to a form, of a model that knows nothing of it."""

import dataclasses
import json
import re

import jsonschema
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.data import tokenizers
from fusedkv_jax.generation import PromptError
from fusedkv_jax.generation.requests import Codec
from fusedkv_jax.serving import RequestError
from fusedkv_jax.serving.grammars import Grammars
from tests.data.test_tokenizers import train_bpe
from tests.serving.served import GREEDY, Json, Letters, all_tokens, engine, model, prompts, run

DIGITS = {"type": "integer", "minimum": 0, "maximum": 99}
SCHEMAS = [
    {"type": "object", "properties": {"a": DIGITS, "b": {"enum": ["x", "yz", None]}}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "object", "properties": {"c": {"type": "string", "maxLength": 4}}, "required": ["c"]},
    {"anyOf": [{"type": "null"}, {"type": "array", "items": DIGITS, "maxItems": 2}]},
    {"type": "object", "properties": {"d": {"type": "object", "properties": {"e": DIGITS}}}},
]
SCHEMAS = [
    {**schema, "additionalProperties": False} if schema.get("type") == "object" else schema
    for schema in SCHEMAS
]
SCHEMAS[4]["properties"]["d"]["additionalProperties"] = False


def held(max_tokens=36, **form):
    """Parameters of a random output of this form."""
    form = fkv.StructuredOutputsParams(**form)
    return fkv.SamplingParams(max_tokens=max_tokens, structured_outputs=form)


def text(deltas, index=0):
    return "".join(delta.text for delta in deltas if delta.index == index)


def test_every_output_is_of_its_schema():
    params = []
    for seed in range(50):
        own = held(json=SCHEMAS[seed % 5], disable_any_whitespace=True)
        greedy = {"temperature": 0.0} if seed % 7 == 0 else {}
        params.append(dataclasses.replace(own, seed=seed, **greedy))
    found = run(engine(tokenizer=Json()), [[seed % 48, 1] for seed in range(50)], params)
    for number, deltas in enumerate(found.values()):
        jsonschema.validate(json.loads(text(deltas)), SCHEMAS[number % 5])
        assert deltas[-1].finish_reason == "stop"
    assert len({text(deltas) for deltas in found.values()}) > 20, "the seeds differ"


@pytest.mark.parametrize(
    "form, pattern",
    [
        ({"regex": "[a-c]{2,4}(:[0-9]+)?"}, "[a-c]{2,4}(:[0-9]+)?"),
        ({"choice": ["yes", "no", "{}"]}, r"yes|no|\{\}"),
        ({"grammar": 'start: pair+ "."\npair: "a" "b"'}, r"(ab)+\."),
        ({"grammar": 'root ::= "x" [0-9] [0-9]?'}, "x[0-9][0-9]?"),
        ({"json_object": True, "whitespace_pattern": " ?"}, r"\{.*\}"),
    ],
)
def test_outputs_match_and_end_where_nothing_may_follow(form, pattern):
    params = [dataclasses.replace(held(**form), seed=seed) for seed in range(8)]
    found = run(engine(tokenizer=Json()), [[seed] for seed in range(8)], params)
    ended = 0
    for deltas in found.values():
        last = deltas[-1]
        assert last.finish_reason in ("stop", "length") and last.stop_reason is None
        if last.finish_reason == "stop":
            assert re.fullmatch(pattern, text(deltas), re.DOTALL)
            ended += 1
    assert ended
    if "choice" in form:
        assert ended == 8 and sum(len(d.token_ids) for d in found["0"]) == len(text(found["0"]))


def test_rows_beside_them_are_as_alone():
    tokenizer, given = Json(), prompts(12)
    plain = all_tokens(run(engine(tokenizer=tokenizer), given, GREEDY))
    form = dataclasses.replace(held(12, regex="[a-z]+"), temperature=0.0)
    alone = all_tokens(run(engine(tokenizer=tokenizer), given, form))
    assert all(len(tokens) == 12 or tokens[-1] == 60 for tokens in alone)
    assert all(21 < token < 48 or token == 60 for tokens in alone for token in tokens)
    mixed = run(engine(tokenizer=tokenizer), given, [GREEDY, form] * 6)
    for number, tokens in enumerate(all_tokens(mixed)):
        assert tokens == (alone if number % 2 else plain)[number]


def test_several_outputs_and_one_that_is_aborted():
    tokenizer = Json()
    tokenizer.eos_id = None  # the form alone ends them
    served = engine(tokenizer=tokenizer)
    params = dataclasses.replace(held(choice=["abcdefgh", "bcdefghi"]), n=4, seed=3)
    for name in ("gone", "kept"):
        served.add([1, 2], params, request_id=name)
    deltas = served.step() + served.step() + served.step()
    gone = served.abort("gone")
    assert [delta.finish_reason for _, delta in gone] == ["abort"] * 4
    while served.unfinished:
        deltas += served.step()
    kept = [delta for name, delta in deltas if name == "kept"]
    texts = [text(kept, index) for index in range(4)]
    assert set(texts) == {"abcdefgh", "bcdefghi"}
    assert served.stats().pages_used == 0


def test_where_nothing_is_allowed_the_request_alone_ends():
    params = dataclasses.replace(held(choice=["ab"]), bad_words=["b"])
    deltas = run(engine(tokenizer=Json()), [[1], [1]], [params, held(choice=["cd"])])
    assert deltas["0"][-1].error is not None
    assert "together exclude every token" in deltas["0"][-1].error
    assert text(deltas["1"]) == "cd"


@pytest.mark.parametrize(
    "form, message",
    [
        ({"json": {"type": "nope"}}, "json: Invalid type: nope"),
        ({"json": "{"}, "json: Expecting property name"),
        ({"json": "[" * 60_000}, "json is nested too deeply"),
        ({"json": {"type": "array", "uniqueItems": True}}, "json: Unimplemented keys"),
        ({"json": {"enum": ["x" * 70_000]}}, "characters; use 65536"),
        ({"regex": "(a"}, "regex: .* unclosed group"),
        ({"grammar": "start: other"}, "grammar: .* unknown name"),
    ],
)
def test_forms_that_cannot_be_followed_are_refused(form, message):
    with pytest.raises(RequestError, match=message) as error:
        engine(tokenizer=Json()).check([1], held(**form), "a")
    assert error.value.param == "structured_outputs" and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "form, message",
    [
        ({}, "has nothing; give one of"),
        ({"regex": "a", "json_object": True}, "has regex and json_object; give one"),
        ({"regex": ""}, "regex is ''; use a text"),
        ({"choice": []}, "needs texts of at least one character"),
        ({"json": {"a": float("nan")}}, "json is no JSON"),
    ],
)
def test_forms_that_make_no_sense_are_refused(form, message):
    with pytest.raises(ValueError, match=message):
        fkv.StructuredOutputsParams(**form)


def test_what_they_need_is_said():
    params = held(regex="a")
    for tokenizer in (None, Letters()):
        with pytest.raises(RequestError, match="need a tokenizer that tells the bytes"):
            engine(tokenizer=tokenizer).check([1], params, "a")
    with pytest.raises(PromptError, match="prompt 0 has structured_outputs; fkv.LLM serves them"):
        fkv.generate(model(), [[1]], params, tokenizer=Json())


def walk(grammars, form, decode, seed, most=4000):
    """A random output of the grammar, as the masks let it grow."""
    rng, tokens = np.random.default_rng(seed), []
    constraint = grammars.constraint(fkv.StructuredOutputsParams(**form))
    while not constraint.complete and len(tokens) < most:
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        tokens.append(int(rng.choice(np.nonzero(bits)[0])))
        constraint.accept(tokens[-1])
        assert constraint.error is None
    return decode(tokens)


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_tokens_of_bytes_and_of_a_tokenizer_file(name, tmp_path):
    """Characters of several bytes, and tokens of several characters."""
    path = "byte" if name == "byte" else str(train_bpe(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.load(path)
    grammars = Grammars(Codec(tokenizer), tokenizer.vocab_size + 5)
    schema = {"type": "string", "pattern": "^[ä日🙂h-t ]{1,9}$"}
    for seed in range(10):
        found = walk(
            grammars, {"json": schema, "disable_any_whitespace": True}, tokenizer.decode, seed
        )
        jsonschema.validate(json.loads(found), schema)
        assert walk(grammars, {"choice": ["日本", "the"]}, tokenizer.decode, seed) in (
            "日本",
            "the",
        )
