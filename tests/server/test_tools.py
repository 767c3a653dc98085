"""Calls of tools that clients insist on: their form, their chunks, and what is refused."""

import json

import jsonschema
import openai
import pytest

from fusedkv_jax.generation.requests import Codec
from fusedkv_jax.server.tools import ForcedCalls
from fusedkv_jax.serving.grammars import Grammars
from tests.server import fake
from tests.server.running import serving
from tests.serving.served import Json
from tests.serving.test_structured import walk

HELLO = [{"role": "user", "content": "hello"}]
NUMBER = {"$ref": "#/$defs/number"}
SCHEMA = {
    "type": "object",
    "properties": {"x": NUMBER, "b": {"enum": ['"]', "}{", "z"]}},
    "required": ["x", "b"],
    "additionalProperties": False,
    "$defs": {"number": {"type": "integer", "minimum": 0, "maximum": 99}},
}
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]
LOOK = {"type": "function", "function": {"name": "look"}}
CALLS = r'[{"name":"look","arguments":{"x":7,"b":"\"]}{"}},{"name":"stop","arguments":{}}]'


def pieces(text, size):
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.mark.parametrize("choice", ["required", LOOK])
@pytest.mark.parametrize("parallel", [True, False])
def test_whatever_is_generated_is_calls_of_the_tools(choice, parallel):
    tokenizer = Json()
    grammars = Grammars(Codec(tokenizer), tokenizer.vocab_size)
    calls = ForcedCalls.of(TOOLS, choice, parallel)
    names, counts = set(), set()
    for seed in range(12):
        form = {"json": calls.form().json, "disable_any_whitespace": True}
        text = walk(grammars, form, tokenizer.decode, seed)
        found = {}
        reader = calls.reader()
        for piece in pieces(text, seed % 5 + 1):
            for call in reader.push(piece):
                own = found.setdefault(call["index"], {"name": "", "arguments": ""})
                for key, value in call["function"].items():
                    own[key] += value
        for own in found.values():
            arguments = json.loads(own["arguments"])
            schema = SCHEMA if own["name"] == "look" else {"type": "object", "maxProperties": 0}
            jsonschema.validate(arguments, schema)
            names.add(own["name"])
        counts.add(len(found))
        if choice == "required":
            whole = [(call["name"], call["arguments"]) for call in json.loads(text)]
            assert whole == [(own["name"], json.loads(own["arguments"])) for own in found.values()]
    assert names == ({"look", "stop"} if choice == "required" else {"look"})
    assert max(counts) > 1 if choice == "required" and parallel else counts == {1}


def test_answers_and_streams_of_calls(monkeypatch):
    monkeypatch.setattr(fake, "TEXT", CALLS + "END")
    with serving(fake.FakeEngine()) as toy, toy.sdk() as sdk:
        create = sdk.chat.completions.create
        asked = dict(model="toy", messages=HELLO, tools=TOOLS, stop="END")
        (choice,) = create(**asked, tool_choice="required").choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        called = [
            (call.function.name, call.function.arguments) for call in choice.message.tool_calls
        ]
        assert called == [("look", r'{"x":7,"b":"\"]}{"}'), ("stop", "{}")]
        assert toy.engine.served[-1].structured_outputs.kind == "json"
        streamed = {}
        for chunk in create(**asked, tool_choice="required", stream=True):
            for call in chunk.choices[0].delta.tool_calls or ():
                assert call.id.startswith("call_") and call.type == "function"
                streamed[call.index] = call.function.name, call.function.arguments
        assert list(streamed.values()) == called and list(streamed) == [0, 1]
        assert chunk.choices[0].finish_reason == "tool_calls"
        # A call that is cut is not shown, those before it are.
        (cut,) = create(**asked, tool_choice="required", max_tokens=60).choices
        assert cut.finish_reason == "length" and len(cut.message.tool_calls) == 1


def test_arguments_of_calls_are_as_the_model_writes_them():
    """Numbers among them, which a Python float would round or turn into what no JSON has."""
    reader = ForcedCalls({"look": {}}, named=False).reader()
    arguments = '{"x":1e999,"y":0.10,"z":' + "7" * 5000 + ',"b":"ü\\u00fc"}'
    (call,) = reader.push(f'[{{"name":"look","arguments":{arguments}}}]')
    assert call["function"] == {"name": "look", "arguments": arguments}


def test_a_named_function_gets_its_arguments_as_they_come(monkeypatch):
    arguments = '{"x":7,"b":"z"}'
    monkeypatch.setattr(fake, "TEXT", arguments + "END")
    with serving(fake.FakeEngine()) as toy, toy.sdk() as sdk:
        create = sdk.chat.completions.create
        asked = dict(model="toy", messages=HELLO, tools=TOOLS, tool_choice=LOOK, stop="END")
        (choice,) = create(**asked, n=1).choices
        (call,) = choice.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("look", arguments)
        assert choice.finish_reason == "stop"
        chunks = list(create(**asked, stream=True))
        calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
        assert "".join(call.function.arguments for call in calls) == arguments and len(calls) > 3
        assert calls[0].function.name == "look" and all(c.id is None for c in calls[1:])


@pytest.mark.parametrize(
    "changes, param",
    [
        ({"tools": []}, "tools"),
        ({"tool_choice": "look"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[1]]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "tool_choice"),
    ],
)
def test_what_cannot_be_called_is_refused(toy, changes, param):
    asked = {"model": "toy", "messages": HELLO, "tools": TOOLS, "tool_choice": "required"}
    with toy.sdk() as sdk, pytest.raises(openai.BadRequestError) as error:
        sdk.chat.completions.create(**{**asked, **changes})
    assert error.value.param == param
