"""The server over the real engine, with a small model."""

import concurrent.futures
import json
import re

import jsonschema
import pytest
import tokenizers as hf

import fusedkv_jax as fkv
from fusedkv_jax.data import tokenizers
from fusedkv_jax.serving import AsyncEngine
from tests.data.test_tokenizers import train_bpe
from tests.server.running import serving
from tests.serving.served import GREEDY, LONGEST, PAGE, Json, engine, prompts, run


def test_clients_get_what_the_engine_gives():
    given = [[token % 60 for token in prompt] for prompt in prompts(8)]
    alone = run(engine(tokenizer=Json()), given, GREEDY)
    texts = ["".join(delta.text for delta in alone[str(i)]) for i in range(len(given))]
    front = AsyncEngine(engine(tokenizer=Json()), model_name="toy")
    with serving(front, template=None, api_keys=["a", "b"]) as running:

        def ask(prompt, key="a", **more):
            body = {"prompt": prompt, "temperature": 0, "max_tokens": 12, **more}
            headers = {"Authorization": f"Bearer {key}"}
            return running.http.post("/v1/completions", json=body, headers=headers)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = [done.json()["choices"][0] for done in pool.map(ask, given)]
        assert [choice["text"] for choice in found] == texts
        several = ask(given[:3]).json()["choices"]
        assert [choice["text"] for choice in several] == texts[:3]
        seeded = [ask("abc", n=3, temperature=1, seed=4).json()["choices"] for _ in range(2)]
        assert seeded[0] == seeded[1] and len(seeded[0]) == 3
        assert texts[0][2:4] in texts[0]
        stopped = ask(given[0], stop=texts[0][2:4]).json()["choices"][0]
        assert stopped["finish_reason"] == "stop" and texts[0].startswith(stopped["text"])

        shared = [1] * (4 * PAGE + 1)
        usages = [ask(shared, key).json()["usage"] for key in ("a", "a", "b")]
        cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
        assert cached == [0, 4 * PAGE, 0]
        schema = {"type": "array", "items": {"enum": [1, "a", None]}, "maxItems": 2}
        form = {"json": schema, "disable_any_whitespace": True}
        for number in range(4):
            held = ask([number], structured_outputs=form, temperature=1, seed=number).json()
            assert held["choices"][0]["finish_reason"] == "stop"
            jsonschema.validate(json.loads(held["choices"][0]["text"]), schema)
        wrong = ask("a", response_format=_format({"$ref": "#/a"}))
        error = wrong.json()["error"]
        assert wrong.status_code == 400 and error["param"] == "structured_outputs"
        assert "Pointer '/a' does not exist" in error["message"] and "\n" not in error["message"]
        _check_echo(ask("abcd", echo=True, logprobs=2, prompt_logprobs=2, max_tokens=1).json())

        refused = ask([1] * LONGEST)
        assert refused.status_code == 400 and str(LONGEST) in refused.json()["error"]["message"]
        assert running.http.get("/health").status_code == 200
        auth = {"headers": {"Authorization": "Bearer a"}}
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert running.metric(gauge, **auth) == 0


def test_log_probabilities_tell_special_tokens(tmp_path):
    path = train_bpe(tmp_path / "tokenizer.json", ("<s>", "</s>"), pad=False)
    served = engine(tokenizer=tokenizers.load(str(path)))
    with serving(AsyncEngine(served, model_name="toy"), template=None) as running:
        body = {"prompt": [0, 3, 1], "echo": True, "logprobs": 1, "prompt_logprobs": 0}
        body |= {"logit_bias": {"1": 100}, "max_tokens": 1, "ignore_eos": True}
        (choice,) = running.http.post("/v1/completions", json=body).json()["choices"]
        texts = {"prompt": ["!", "!!"], "echo": True, "max_tokens": 1, "logit_bias": {"1": 100}}
        shown = running.http.post("/v1/completions", json=texts).json()["choices"]
        assert [each["text"] for each in shown] == ["!", "!!"]  # as they were given, without <s>
    tokens, top = choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"]
    assert tokens[0] == "<s>" and tokens[2:] == ["</s>"] * 2
    assert all("</s>" in place for place in top[2:])  # it was drawn, however unlikely
    assert choice["prompt_logprobs"][2]["1"]["decoded_token"] == "</s>"


def test_tokens_that_the_tokenizer_has_not_are_no_text(tmp_path):
    words = hf.models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a")
    hf.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    served = engine(tokenizer=tokenizers.load(str(tmp_path)))
    body = {"prompt": [0, 50], "logprobs": 2, "max_tokens": 16}
    body |= {"logit_bias": {"0": 100, "40": 100}, "temperature": 2, "seed": 1, "ignore_eos": True}
    with serving(AsyncEngine(served, model_name="toy"), template=None) as running:
        whole_body, streamed = {**body, "prompt_logprobs": 0}, {**body, "stream": True}
        (whole,) = running.http.post("/v1/completions", json=whole_body).json()["choices"]
        lines = running.http.post("/v1/completions", json=streamed).text
        refused = running.http.post("/detokenize", json={"tokens": [0, 40]})
    shown = whole["logprobs"]["tokens"]
    assert set(shown) == {"a", ""} and whole["text"].split() == [text for text in shown if text]
    assert whole["prompt_logprobs"][1]["50"]["decoded_token"] == ""
    parts = [json.loads(line)["choices"] for line in re.findall(r"data: (\{.*)", lines)]
    assert "".join(choice["text"] for (choice,) in parts) == whole["text"]
    # What a client gives is refused.
    assert refused.status_code == 400 and "token id 40 is outside" in refused.text


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_are_those_of_the_text_that_is_shown(tmp_path, stream):
    path = train_bpe(tmp_path / "tokenizer.json", ("<s>", "</s>"), pad=False)
    served = engine(tokenizer=tokenizers.load(str(path)))
    common = {"logit_bias": {"1": 100}, "logprobs": 0, "max_tokens": 2, "ignore_eos": True}
    common |= {"stream": stream}
    with serving(AsyncEngine(served, model_name="toy"), template=None) as running:

        def found(**body):
            text = running.http.post("/v1/completions", json={**common, **body}).text
            lines = [text] if not stream else re.findall(r"data: (\{.*)", text)
            choices = [choice for line in lines for choice in json.loads(line)["choices"]]
            shown = "".join(choice["text"] for choice in choices)
            return shown, [
                o for c in choices if c["logprobs"] for o in c["logprobs"]["text_offset"]
            ]

        assert found(prompt="!") == ("", [0, 0])  # both are </s>, which is hidden
        assert found(prompt="!", skip_special_tokens=False) == ("</s></s>", [0, 4])
        # The prompt's <s> is not shown where it is a text, and is where it is given as a token.
        assert found(prompt="!!", echo=True)[1][-2:] == [2, 2]
        assert found(prompt="!!", echo=True)[1][:2] == [0, 0]
        assert found(prompt=[0, 3], echo=True)[1] == [0, 3, 4, 4]


def test_a_key_has_one_share_whatever_its_salts():
    policy = fkv.serving.POLICIES["vtc"]()
    front = AsyncEngine(engine(policy=policy), model_name="toy")
    with serving(front, template=None, api_keys=["a", "b"]) as running:
        for key, salt in (("a", None), ("a", "1"), ("a", "2"), ("b", "1")):
            headers = {"Authorization": f"Bearer {key}"}
            body = {"prompt": [7] * 9, "max_tokens": 3, "cache_salt": salt}
            done = running.http.post("/v1/completions", json=body, headers=headers).json()
            assert done["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    # A prompt of 9 tokens and 3 generated ones, which weigh 2; the other begins where the first is.
    assert sorted(filter(None, policy.counters.values())) == [45.0, 60.0]


def test_metrics_count_what_is_drafted_and_accepted():
    speculation = fkv.NGramSpeculation(draft_tokens=3, prompt_lookup_min=1)
    served = engine(tokenizer=Json(), speculation=speculation)
    plans = []
    served.watch = plans.append
    with serving(AsyncEngine(served, model_name="toy"), template=None) as running:
        body = {"prompt": [5, 6, 7] * 4, "temperature": 0, "max_tokens": 20, "ignore_eos": True}
        for _ in range(3):
            assert running.http.post("/v1/completions", json=body).status_code == 200
        running.idle()
        drafts, tokens, accepted = (
            running.metric(f"spec_decode_num_{name}_total")
            for name in ("drafts", "draft_tokens", "accepted_tokens")
        )
    checked = [draft for plan in plans for draft in plan.drafts]
    right = sum(count - 1 for plan in plans if plan.drafts for count in plan.counts)
    assert drafts == sum(map(bool, checked)) and tokens == sum(map(len, checked))
    assert tokens > drafts > accepted == right > 0


def _format(schema):
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def _check_echo(document):
    """The prompt before the output, with the log-probabilities of both."""
    (choice,) = document["choices"]
    likely, found = choice["prompt_logprobs"], choice["logprobs"]
    assert found["tokens"][:4] == list("abcd") and choice["text"][:4] == "abcd"
    assert len(found["token_logprobs"]) == 5 and len(likely) == 4
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is likely[0] is None
    for place, token in enumerate(Json().encode("abcd")[1:], start=1):
        entry = likely[place][str(token)]
        assert found["token_logprobs"][place] == entry["logprob"] < 0
        assert entry["decoded_token"] == "abcd"[place]
        assert 2 <= len(likely[place]) <= 3
        shown = {entry["decoded_token"]: entry["logprob"] for entry in likely[place].values()}
        assert found["top_logprobs"][place] == shown  # the token itself among them
