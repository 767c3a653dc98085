"""The openai SDK against the server: every case is one that a client of OpenAI's would write."""

import json

import openai
import pytest

from fusedkv_jax.data.chat import ChatTemplate
from tests.server.fake import TEXT, FakeEngine
from tests.server.running import Running, serving

HELLO = [{"role": "user", "content": "hello"}]


def say(length: int) -> str:
    return (TEXT.encode() * (length // len(TEXT) + 1))[:length].decode(errors="replace")


@pytest.fixture(scope="module")
def sdk(toy: Running):
    with toy.sdk() as client:
        yield client


def test_completion(sdk):
    done = sdk.completions.create(model="toy", prompt="abc", max_tokens=6)
    assert done.choices[0].text == say(6) and done.choices[0].finish_reason == "length"
    assert done.object == "text_completion" and done.id.startswith("cmpl-")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (4, 6)  # with BOS
    assert done.usage.total_tokens == 10


def test_completion_has_sixteen_tokens_unless_told(sdk):
    done = sdk.completions.create(model="toy", prompt="abc")
    assert done.usage.completion_tokens == 16


def test_token_ids_and_several_prompts(sdk):
    done = sdk.completions.create(model="toy", prompt=[1, 2, 3], max_tokens=2)
    assert done.usage.prompt_tokens == 3
    done = sdk.completions.create(model="toy", prompt=["a", "b", "c"], n=2, max_tokens=3)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3, 4, 5]
    assert done.usage.completion_tokens == 18 and done.usage.prompt_tokens == 6
    done = sdk.completions.create(model="toy", prompt=[[1], [2, 3]], max_tokens=1)
    assert len(done.choices) == 2


def test_echo(sdk):
    done = sdk.completions.create(model="toy", prompt="abc", echo=True, max_tokens=4)
    assert done.choices[0].text == "abc" + say(4)
    chunks = sdk.completions.create(model="toy", prompt="abc", echo=True, max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abc" + say(4)


def test_chat(sdk):
    done = sdk.chat.completions.create(model="toy", messages=HELLO, max_completion_tokens=5)
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].message.content == say(5)
    assert done.object == "chat.completion" and done.id.startswith("chatcmpl-")


def test_content_in_parts_is_one_text(sdk):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    counts = [
        sdk.chat.completions.create(
            model="toy", messages=[{"role": "user", "content": content}], max_tokens=1
        ).usage.prompt_tokens
        for content in ("hello", parts)
    ]
    assert counts[0] == counts[1]


def test_tools_pass_through_the_template(sdk, toy):
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    counts = {
        choice: sdk.chat.completions.create(
            model="toy", messages=HELLO, tools=tools, tool_choice=choice, max_tokens=1
        ).usage.prompt_tokens
        for choice in ("auto", "none")
    }
    assert counts["auto"] > counts["none"] + len("look_up")
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    turns = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "found"},
    ]
    assert sdk.chat.completions.create(model="toy", messages=turns, tools=tools, max_tokens=1)


@pytest.mark.parametrize(
    "written, arguments, shown",
    [
        ("{{ call.arguments | tojson }}", '{"city": "Paris"}', '{"city": "Paris"}'),
        ("{{ call.arguments | tojson }}", "", "{}"),
        ("{{ call.arguments | tojson }}", "{spoiled", '"{spoiled"'),
        ("{{ '`' + call.arguments + '`' }}", '{"city": "Paris"}', '`{"city": "Paris"}`'),
    ],
)
def test_calls_of_earlier_turns_are_shown_as_the_model_has_made_them(written, arguments, shown):
    """OpenAI has the arguments as a text, and most templates write them as JSON."""
    source = (
        "{% for m in messages %}{% for c in m.tool_calls %}{% set call = c.function %}"
        + written
        + "{% endfor %}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "a", "arguments": arguments}}
    body = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    with serving(FakeEngine(), template=ChatTemplate(source)) as running:
        tokens = running.http.post("/tokenize", json=body).json()["tokens"]
    assert bytes(tokens).decode() == shown


def test_template_variables(toy):
    body = {"messages": HELLO, "chat_template_kwargs": {"mood": "glad"}}
    tokens = toy.http.post("/tokenize", json=body).json()["tokens"]
    text = toy.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text == "<user>hello</>[glad]<assistant>"


@pytest.mark.parametrize("length", [1, 2, 7, 24, 25, 26, 60, 200])
@pytest.mark.parametrize("stop", [None, "END", ["<|hi|>", "zzz"]])
def test_streams_join_to_the_whole(sdk, length, stop):
    asked = {"model": "toy", "max_tokens": length, "stop": stop}
    whole = sdk.completions.create(prompt="a", **asked).choices[0]
    chunks = list(sdk.completions.create(prompt="a", stream=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    # What was shown was shown for good: no chunk ends within a character.
    assert all("\ufffd" not in chunk.choices[0].text for chunk in chunks[:-1])
    chunks = list(sdk.chat.completions.create(messages=HELLO, stream=True, **asked))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.text
    for end in [stop] if isinstance(stop, str) else stop or []:
        assert end not in whole.text
    if whole.finish_reason == "length":
        assert whole.text == say(length)


def test_streams_of_several_choices(sdk):
    texts = ["", "", "", ""]
    for chunk in sdk.completions.create(
        model="toy", prompt=["a", "b"], n=2, max_tokens=30, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [say(30)] * 4


def test_usage_of_a_stream(sdk):
    chunks = list(
        sdk.chat.completions.create(
            model="toy",
            messages=HELLO,
            max_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 9


def test_usage_of_every_chunk(sdk):
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"model": "toy", "prompt": "a", "max_tokens": 3, "stream": True}
    chunks = sdk.completions.create(**asked, stream_options=options)
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 3, 3]
    options = {"continuous_usage_stats": True}
    assert not any(c.usage for c in sdk.completions.create(**asked, stream_options=options))


def test_options_of_a_stream_that_are_unknown_are_logged(toy, caplog):
    with caplog.at_level("INFO", "fusedkv_jax.server.protocol"):
        body = {"prompt": "a", "stream": True, "stream_options": {"include_costs": True}}
        assert toy.http.post("/v1/completions", json=body).status_code == 200
    assert "field 'stream_options.include_costs', which this server ignores" in caplog.text


def test_special_tokens_before_those_of_a_template(toy):
    body = {"messages": HELLO}
    plain, more, less = (
        toy.http.post("/tokenize", json={**body, "add_special_tokens": each}).json()["tokens"]
        for each in (None, True, False)
    )
    assert more == [toy.engine.tokenizer.bos_id, *plain] and less == plain
    counts = [
        toy.http.post("/v1/chat/completions", json={**body, "max_tokens": 1, **own}).json()["usage"]
        for own in ({}, {"add_special_tokens": True})
    ]
    assert [count["prompt_tokens"] for count in counts] == [len(plain), len(more)]


def test_cached_tokens(sdk):
    prompt = [7] * 100
    first, second = (
        sdk.completions.create(model="toy", prompt=prompt, max_tokens=1).usage for _ in range(2)
    )
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == 96


def test_logprobs(sdk):
    done = sdk.completions.create(model="toy", prompt="a", max_tokens=2, logprobs=3)
    found = done.choices[0].logprobs
    assert found.tokens == ["G", "r"] and found.token_logprobs == [-0.5, -0.5]
    assert found.top_logprobs[0] == {"G": -0.5, "H": -1.5, "I": -2.5}
    assert found.text_offset == [0, 1]
    done = sdk.completions.create(model="toy", prompt="a", max_tokens=7, logprobs=0)
    assert done.choices[0].text == "Grüße"  # two characters have two tokens each
    assert done.choices[0].logprobs.text_offset == [0, 1, 2, 2, 3, 3, 4]
    asked = {"model": "toy", "messages": HELLO, "max_tokens": 2, "logprobs": True}
    places = sdk.chat.completions.create(top_logprobs=2, **asked).choices[0].logprobs.content
    assert [place.token for place in places] == ["G", "r"]
    assert [top.token for top in places[0].top_logprobs] == ["G", "H"]
    more = sdk.chat.completions.create(**asked | {"max_tokens": 6}).choices[0].logprobs.content
    assert [place.token for place in more[2:4]] == ["\ufffd"] * 2  # halves of a character
    assert bytes(byte for place in more for byte in place.bytes).decode() == "Grüß"
    assert not sdk.chat.completions.create(**asked).choices[0].logprobs.content[0].top_logprobs
    chunks = sdk.chat.completions.create(stream=True, top_logprobs=1, **asked)
    joined = [
        p.token for c in chunks if c.choices[0].logprobs for p in c.choices[0].logprobs.content
    ]
    assert joined == ["G", "r"]


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", 0.0),
        ("temperature", 2.0),
        ("top_p", 0.3),
        ("seed", 7),
        ("frequency_penalty", -1.5),
        ("presence_penalty", 1.5),
        ("n", 3),
    ],
)
def test_sampling_of_openai(sdk, toy, field, value):
    sdk.completions.create(model="toy", prompt="a", max_tokens=1, **{field: value})
    assert getattr(toy.engine.served[-1], field) == value


@pytest.mark.parametrize(
    "field, value",
    [
        ("top_k", 5),
        ("min_p", 0.1),
        ("repetition_penalty", 1.2),
        ("min_tokens", 1),
        ("stop_token_ids", (3, 4)),
        ("ignore_eos", True),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("bad_words", ("x",)),
    ],
)
def test_sampling_of_vllm(sdk, toy, field, value):
    sdk.chat.completions.create(
        model="toy", messages=HELLO, max_tokens=1, extra_body={field: value}
    )
    assert getattr(toy.engine.served[-1], field) == value


def test_bias_and_wide_seeds(sdk, toy):
    sdk.completions.create(model="toy", prompt="a", logit_bias={"65": -50}, seed=2**40 + 5)
    assert toy.engine.served[-1].logit_bias == ((65, -50.0),)
    assert toy.engine.served[-1].seed == 5


def test_forms_of_answers(sdk, toy):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    sdk.chat.completions.create(model="toy", messages=HELLO, max_tokens=2, response_format=form)
    assert json.loads(toy.engine.served[-1].structured_outputs.json) == schema
    sdk.completions.create(
        model="toy", prompt="a", **_also(response_format={"type": "json_object"})
    )
    assert toy.engine.served[-1].structured_outputs.kind == "json_object"
    asked = {"choice": ["a", "b"], "disable_any_whitespace": True}
    sdk.completions.create(model="toy", prompt="a", **_also(structured_outputs=asked))
    found = toy.engine.served[-1].structured_outputs
    assert found.choice == ("a", "b") and found.disable_any_whitespace
    sdk.completions.create(model="toy", prompt="a", **_also(guided_regex="a+"))
    assert toy.engine.served[-1].structured_outputs.regex == "a+"
    sdk.completions.create(model="toy", prompt="a", **_also(response_format={"type": "text"}))
    assert toy.engine.served[-1].structured_outputs is None


def test_null_stands_for_left_out(toy):
    body = {
        "prompt": "a",
        "max_tokens": None,
        "n": None,
        "stop": None,
        "seed": None,
        "stream": None,
    }
    assert toy.http.post("/v1/completions", json=body).status_code == 200


def test_models(sdk):
    assert [model.id for model in sdk.models.list()] == ["toy"]
    assert sdk.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        sdk.models.retrieve("other")


def _also(**fields):
    return {"extra_body": fields}


@pytest.mark.parametrize(
    "error, param, asked",
    [
        (openai.NotFoundError, "model", {"model": "other"}),
        (openai.BadRequestError, "top_p", {"top_p": 2.0}),
        (openai.BadRequestError, "n", {"n": 1000}),
        (openai.BadRequestError, "prompt", {"max_tokens": 10_000}),
        (openai.BadRequestError, "logprobs", {"logprobs": 21}),
        (openai.BadRequestError, "prompt", {"prompt": [999]}),
        (openai.BadRequestError, "prompt", {"prompt": []}),
        (openai.APIStatusError, "suffix", {"suffix": "x"}),
        (openai.BadRequestError, "response_format", _also(response_format={"type": "xml"})),
        (openai.BadRequestError, "response_format", _also(response_format={"type": "json_schema"})),
        (openai.BadRequestError, "structured_outputs", _also(structured_outputs={})),
        (openai.BadRequestError, "structured_outputs", _also(structured_outputs={"choice": "a"})),
        (
            openai.BadRequestError,
            "structured_outputs",
            _also(response_format={"type": "json_object"}, structured_outputs={"regex": "a"}),
        ),
        (openai.BadRequestError, "prompt_logprobs", _also(prompt_logprobs=21)),
        (openai.BadRequestError, "prompt_logprobs", {"stream": True, **_also(prompt_logprobs=1)}),
    ],
)
def test_refusals(sdk, error, param, asked):
    with pytest.raises(error) as caught:
        sdk.completions.create(**{"model": "toy", "prompt": "a", **asked})
    assert caught.value.body["param"] == param
    assert caught.value.status_code in (400, 404, 501)


def test_without_a_template_chat_says_what_to_do():
    with serving(FakeEngine(), template=None) as running, running.sdk() as client:
        with pytest.raises(openai.BadRequestError, match="/v1/completions"):
            client.chat.completions.create(model="toy", messages=HELLO)
        assert "{{mode}}" not in running.http.get("/").text


def test_names_of_requests_are_echoed(toy):
    response = toy.http.get("/v1/models", headers={"X-Request-Id": "mine"})
    assert response.headers["X-Request-Id"] == "mine"
    response = toy.http.get("/v1/models", headers={"X-Request-Id": "not a name"})
    assert len(response.headers["X-Request-Id"]) == 32
