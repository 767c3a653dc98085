"""Chat templates: what they render, where they come from, and that they can do nothing else."""

import json

import pytest

from fusedkv_jax.data.chat import ChatError, ChatTemplate, load_template, read_text

SOURCE = """{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
    {% if loop.index > 9 %}{% break %}{% endif %}
<|{{ message['role'] }}|>{{ message.content | trim }}</s>
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " größe 🙂 "},
]


def test_renders_as_the_hub_expects():
    template = ChatTemplate(SOURCE, {"bos_token": "<s>"})
    expected = "<s>\n<|system|>Be brief.</s>\n<|user|>größe 🙂</s>\n"
    assert template.render(MESSAGES) == expected + "<|assistant|>"
    assert template.render(MESSAGES, add_generation_prompt=False) == expected
    tools = ChatTemplate("{{ tools | tojson }}{{ strftime_now('%%') }}")
    assert tools.render(MESSAGES, tools=[{"a": "ä<"}]) == '[{"a": "ä<"}]%'


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages[7].role.x }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('roles must\nalternate') }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source):
    with pytest.raises(ChatError, match="the chat template refuses the messages: ") as error:
        ChatTemplate(source).render(MESSAGES)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("without_type_checks")
def test_malformed_templates_and_messages():
    with pytest.raises(ChatError, match="not valid Jinja: line 2"):
        ChatTemplate("a\n{% if %}").render(MESSAGES)
    for messages, message in (
        ([], "there are no messages"),
        (["hi"], "message 0 is 'hi'; use {'role'"),
        ([{"role": "user"}], "message 0 has no content"),
    ):
        with pytest.raises(ChatError, match=message):
            ChatTemplate(SOURCE).render(messages)


def test_where_templates_come_from(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    with pytest.raises(ChatError, match="has no chat template"):
        load_template(tmp_path)
    config.write_text("[]")
    with pytest.raises(ChatError, match="not a JSON object"):
        load_template(tmp_path)
    entries = {"bos_token": {"content": "<s>"}, "pad_token": None, "add_bos_token": True}
    config.write_text(json.dumps({**entries, "chat_template": "{{ bos_token }}one"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_template(tmp_path / "tokenizer.json").render(MESSAGES) == "<s>one"
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({**entries, "chat_template": several}))
    assert load_template(tmp_path).render(MESSAGES) == "two"
    (tmp_path / "chat_template.jinja").write_text("three", encoding="utf-8")
    assert load_template(tmp_path).render(MESSAGES) == "three"


def test_files_that_are_not_utf8(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("größe".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt: not UTF-8: byte 0xf6 at offset 2; convert"):
        read_text(file)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "rounds",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ 'a' * 10**10 }}", "a product is longer"),
        ("{% set x = 'aaaaaaaaaa' %}" + "{% set x = x ~ x %}" * 40, "a text is longer"),
        ("{% set x = 'aaaaaaaaaa' %}" + "{% set x = x + x %}" * 40, "a text is longer"),
        ("{{ 9 ** (9 ** 9) }}", "exponent"),
        ("{{ '%999999999d' % 1 }}", "too wide"),
        ("{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "its text is longer"),
        ("{{ (" + "(" * 3000, "nested too deeply"),
    ],
)
def test_templates_that_would_not_end_or_fit_are_refused(source, message):
    with pytest.raises(ChatError, match=message) as refused:
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
    assert "\n" not in str(refused.value)
