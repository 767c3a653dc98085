"""Chat templates: what they render, where they come from, and that they can do nothing else."""

import json

import pytest

from fusedkv_jax.data import template_sizes
from fusedkv_jax.data.chat import ChatError, ChatTemplate, load_template, read_text
from tests.data import single_letters

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
    "source, expected",
    [
        # What the assistant wrote is marked in templates such as SmolLM3's.
        (
            "{% for m in messages %}{% if m.role == 'system' %}{% generation %}"
            "{% set x = m.content %}{{ x }}|{% endgeneration %}{{ x }}{% endif %}{% endfor %}",
            "Be brief.|",
        ),
        ("{{ messages[1] | tojson(ensure_ascii=True) }}", json.dumps(MESSAGES[1])),
        (
            "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
            '{"content":"Be brief.","role":"system"}',
        ),
        ("{% if tools is not none or documents is not none %}tools{% endif %}", ""),
        # Jinja hands calls within loops and blocks more than a template writes.
        (
            "{% for m in messages %}{{ m.role.replace('s', 'S') }}{{ ', '.join([m.role, 'x']) }}|"
            "{{ '{}'.format(m.role) }}{{ m.role.split('s') }}{{ m.role.ljust(9) }}|{% endfor %}",
            "SyStemsystem, x|system['', 'y', 'tem']system   |uSeruser, x|user['u', 'er']user     |",
        ),
        ("{% block b %}{{ messages[0].role.replace('s', 'S') }}{% endblock %}", "SyStem"),
        (
            "{{ messages[1:] | map(attribute='role') | list }}{{ 2.5 * 10**8 }}",
            "['user']250000000.0",
        ),
        ("{{ nothing == 'x' }}{{ nothing ~ 'x' }}{{ 1 < 2 < 3 != 4 }}", "FalsexTrue"),
    ],
)
def test_what_templates_have_of_transformers(source, expected):
    assert ChatTemplate(source).render(MESSAGES) == expected


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


def test_calls_of_tools_need_no_content():
    template = ChatTemplate("{% for m in messages %}[{{ m.content is none }}]{% endfor %}")
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    assert template.render(turns) == "[False][True]"
    with pytest.raises(ChatError, match="message 0 has no content"):
        template.render([{"role": "assistant", "tool_calls": []}])


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
    assert load_template(tmp_path).render(MESSAGES, tools=None) == "two"
    assert load_template(tmp_path).render(MESSAGES, tools=[{"name": "a"}]) == "x"
    (tmp_path / "chat_template.jinja").write_text("three", encoding="utf-8")
    assert load_template(tmp_path).render(MESSAGES) == "three"
    assert load_template(tmp_path).render(MESSAGES, tools=[{"name": "a"}]) == "three"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("four")
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("five")
    assert load_template(tmp_path).render(MESSAGES) == "three"
    assert load_template(tmp_path).render(MESSAGES, tools=[{"name": "a"}]) == "four"
    (tmp_path / "chat_template.jinja").unlink()  # what belongs to it belongs to no other
    assert load_template(tmp_path).render(MESSAGES, tools=[{"name": "a"}]) == "x"


def test_templates_that_transformers_has_saved_are_found_as_there(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra reference")
    single_letters.save(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json")
    )
    tokenizer.chat_template = {
        "default": "plain {{ messages | length }}",
        "tool_use": "{{ tools }}",
    }
    tokenizer.save_pretrained(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    ours = load_template(tmp_path / "saved")
    for tools in (None, [{"name": "a"}]):
        expected = theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
        assert ours.render(MESSAGES, tools=tools) == expected
    assert ours.render(MESSAGES, tools=[{"name": "a"}]) == "[{'name': 'a'}]"


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
        ("{{ '%s' | format('x' * 9999) }}" * 2000, "its text is longer"),
        ("{{ '%99999d' | format(1) }}", "too wide"),
        ("{{ '%*d' % (10**9, 1) }}", "too wide"),
        ("{{ ('%s' * 99999) % ('x' * 99999) }}", "a text is longer"),
        ("{{ '{:999999999d}'.format(1) }}", "too wide"),
        ("{{ '{:{}d}'.format(1, 10**9) }}", "too wide"),
        ("{{ '{:999999999d}'.format_map({}) }}", "too wide"),
        ("{{ ('{0}' * 99999).format('x' * 99999) }}", "a text is longer"),
        ("{{ 'x' | center(10**9) }}", "a text is longer"),
        ("{{ 'x' | center(width=10**9) }}", "a text is longer"),
        ("{{ ['x'] | map('center', 10**9) | join }}", "a text is longer"),
        ("{{ 'x'.ljust(10**9) }}", "a text is longer"),
        ("{{ 'x'.zfill(10**9) }}", "a text is longer"),
        ("{{ '\t'.expandtabs(tabsize=10**9) }}", "a text is longer"),
        ("{{ ('x' * 99999).replace('x', 'y' * 99999) }}", "a text is longer"),
        ("{{ ('x' * 99999) | replace('', 'y' * 99999) }}", "a text is longer"),
        ("{{ ('y' * 99999).join('x' * 99999) }}", "a text is longer"),
        ("{{ range(99999) | join('y' * 99999) }}", "a text is longer"),
        ("{{ 'x\n' | indent(width=10**9, first=true) }}", "a text is longer"),
        ("{{ ('x ' * 9999) | wordwrap(1, wrapstring='y' * 99999) }}", "a text is longer"),
        ("{{ [1] | batch(10**9, 'x') | list }}", "a text is longer"),
        ("{{ [1] | slice(10**9) | list }}", "a text is longer"),
        ("{{ [1] | tojson(indent=10**9) }}", "indent 1000000000 is too large"),
        ("{{ range(4000) | list | tojson(separators=('x' * 4000, '')) }}", "a text is longer"),
        ("{{ 1 | round(10**9, 'ceil') }}", "precision 1000000000 is too large"),
        ("{{ (1).to_bytes(10**9, 'big') }}", "not for templates"),
        ("{{ 'x'.translate({120: 'y' * 9999}) }}", "not for templates"),
        ("{{ lipsum(n=10**9) }}", "'lipsum' is undefined"),
        ("{{ [[1]] | sum(start=[]) }}", "a sum of lists"),
        ("{{ 10 ** 999 ** 999 }}", "exponent 999 is too large"),
        ("{% set x = 9 %}" + "{% set x = x * x %}" * 40, "a product of numbers"),
        ("{% set x = [1] %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}", "a text is longer"),
        ("{% set x = [1] %}" + "{% set x = [x, x] %}" * 40 + "{{ x | tojson }}", "a text is"),
        (
            "{% for a in [0] recursive %}{{ loop(range(9999)) if loop.depth < 5 }}{% endfor %}",
            "rounds",
        ),
        # Lists that share their parts: as text, or to compare and hash, each is very long.
        *(
            (
                "{% set x, y = (1,), (1,) %}" + "{% set x, y = (x, x), (y, y) %}" * 40 + use,
                "a text is",
            )
            for use in (
                *("{{ x == y }}", "{{ x in [y] }}", "{{ x is eq y }}", "{{ [x].index(y) }}"),
                *(
                    "{{ [x] | select('eq', y) | list }}",
                    "{{ [x] | unique | list }}",
                    "{{ x | upper }}",
                ),
                *("{{ [x, y] | sort }}", "{{ {x: 1} }}", "{{ {}[x] }}", "{{ {}.get(x) }}"),
                *("{{ {1: x}.items() }}", "{{ namespace(a=x) }}", "{{ raise_exception(x) }}"),
            )
        ),
        # What is kept on the way.
        *(
            ("{% set x = 'x' * 99999 %}" + use, "rounds")
            for use in (
                "{% set y %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endset %}",
                "{% macro f() %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endmacro %}"
                "{{ f() }}",
                "{% set y %}{% for i in range(9999) %}" + "x" * 99_999 + "{% endfor %}{% endset %}",
                "{% for i in range(9999) %}{% set y = x ~ i %}{% endfor %}",
                "{% for i in range(9999) %}{% set y = x[1:] %}{% endfor %}",
                "{% for i in range(9999) %}{% set y = 'x' * 99999 %}{% endfor %}",
                "{% for i in range(9999) %}{% set y = 'xy' in x %}{% endfor %}",
                "{% for i in range(9999) %}{% set y = range(9999) | list %}{% endfor %}",
            )
        ),
        (
            "{% set x = 'x' * 99999 %}{% for a in range(9999) %}{{ (x|upper)[0] }}{% endfor %}",
            "rounds",
        ),
    ],
)
def test_templates_that_would_not_end_or_fit_are_refused(source, message, monkeypatch):
    ChatTemplate("").render(MESSAGES)  # imports what keeps the bound of products
    monkeypatch.setattr(template_sizes, "MAX_LENGTH", 100_000)  # what counting takes its time for
    with pytest.raises(ChatError, match=message) as refused:
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
    assert "\n" not in str(refused.value)


def test_bounded_filters_and_methods_still_work():
    source = (
        "{{ 'x' | center(5) }}|{{ '%-4s%05.1f%%' | format('a', 2) }}|{{ '%(n)s' % {'n': 1} }}|"
        "{{ '{:>4}{a!r}'.format(1, a='b') }}|{{ 'a\nb' | indent(2) }}|{{ ['a', 'b'] | join('-') }}|"
        "{{ [1, 2, 3] | batch(2, 0) | list }}|{{ {'a': [1]} | tojson(indent=2) }}|"
        "{{ 'aXa'.replace('X', '') }}|{{ 2.345 | round(1) }}|"
        "{{ [1, 2] | map('string') | join(',') }}|"
        "{{ ' a ' | trim | upper }}|{{ nothing | default('d') }}|{{ [3, 1] | sort | first }}|"
        "{{ [{'v': 1}, {'v': 2}] | sum(attribute='v') }}|{{ 2 ** 10 * 3 }}"
    )
    assert ChatTemplate(source).render([{"role": "user", "content": "x"}]) == (
        "  x  |a   002.0%|1|   1'b'|a\n  b|a-b|[[1, 2], [3, 0]]|{\n  \"a\": [\n    1\n  ]\n}|"
        "aa|2.3|1,2|A|d|1|3|3072"
    )
