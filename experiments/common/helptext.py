"""What --help prints: the program, its flags, and every field of its configuration."""

import dataclasses
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from absl import flags

from experiments.common import parsing
from experiments.common.overrides import dataclass_of
from fusedkv_jax.validation import Hint, alternatives

# What absl adds to help texts; the form of a flag says it already.
_ABSL_WORDS = re.compile(r"^<[^>]*>: |;? ?(repeat this option .*|\(a comma separated list\))$")
_CLOSING = """\
Exit codes: 0 done, 2 a mistake (one line says which), 130 Ctrl-C (twice: at once).
Compiled programs are kept in ~/.cache/fusedkv_jax for the next run; JAX_COMPILATION_CACHE_DIR names
another folder, JAX_ENABLE_COMPILATION_CACHE=false turns this off."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a configuration: dotted path, type, default and meaning, as text."""

    path: str
    kind: str
    default: str
    meaning: str


def help_text(document: str, defaults: dict[str, object]) -> str:
    """The whole text.

    Args:
      document: the program's docstring.
      defaults: configurations whose fields can be set, by the flag that sets them: `config` for
        --config.FIELD=VALUE. A class stands for one without values.
    """
    width = min(shutil.get_terminal_size((100, 20)).columns, 100)
    lines = [document.strip(), "", "Flags:"]
    for name, flag in sorted(parsing.own_flags().items()):
        meaning = _ABSL_WORDS.sub("", " ".join((flag.help or "").split()))
        meaning = f"{meaning} {parsing.describe_rules(name)}".strip()
        lines += _entry(f"--{_flag_form(name, flag)}", _flag_default(flag), meaning, width)
    lines += _entry("-h, --help", "", "Show this text.", width)
    lines += _entry("--version", "", "Show the version.", width)
    for flag, config in defaults.items():
        lines += ["", f"Fields, each set by --{flag}.FIELD=VALUE:"]
        for field in describe_fields(config):
            form = f"--{flag}.{field.path}={field.kind}"
            lines += _entry(form, field.default, field.meaning, width)
    return "\n".join([*lines, "", _CLOSING])


def describe_fields(config: Any, prefix: str = "") -> Iterator[Field]:
    """Every field below a dataclass, or an instance of one, whose values are then the defaults."""
    kind = config if isinstance(config, type) else type(config)
    meanings = attribute_meanings(kind)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, path = hints[field.name], prefix + field.name
        value = _default(field) if isinstance(config, type) else getattr(config, field.name)
        inner = dataclass_of(hint)
        if inner is not None:
            part = value if dataclasses.is_dataclass(value) else inner
            yield from describe_fields(part, f"{path}.")
        else:
            yield Field(path, _type(hint), _value(value), meanings.get(field.name, ""))


def attribute_meanings(kind: type) -> dict[str, str]:
    """The `Attributes:` of a class's docstring, by name."""
    text = textwrap.dedent("    " + (kind.__doc__ or ""))
    block = re.search(r"^ *Attributes:\n(.*?)(?=^ *\n *\w+:$|\Z)", text, re.M | re.S)
    if block is None:
        return {}
    body = textwrap.dedent(block[1])
    entries = re.split(r"^(\w+(?:, \w+)*): ", body, flags=re.M)[1:]
    return {
        name: " ".join(meaning.split())
        for names, meaning in zip(entries[::2], entries[1::2], strict=True)
        for name in names.split(", ")
    }


def _entry(form: str, default: str, meaning: str, width: int) -> list[str]:
    head = f"  {form}" + (f"  (default {default})" if default else "")
    return [
        head,
        *textwrap.wrap(meaning, width, initial_indent="      ", subsequent_indent=" " * 6),
    ]


def _flag_form(name: str, flag: flags.Flag) -> str:
    if flag.boolean:
        return f"[no]{name}"
    if isinstance(flag, flags.EnumFlag):
        return f"{name}={'|'.join(flag.parser.enum_values)}"
    kinds = {"int": "integer", "float": "number", "multi int": "integer", "multi float": "number"}
    kind = kinds.get(flag.flag_type(), "text")
    if isinstance(flag, flags.MultiFlag):
        return f"{name}={kind} ..."
    return f"{name}={'a,b,...' if 'list' in flag.flag_type() else kind}"


def _flag_default(flag: flags.Flag) -> str:
    default = flag.default
    if isinstance(default, (list, tuple)):
        default = ",".join(map(str, default)) or None
    if flag.boolean:
        return "on" if default else "off"
    return "none" if default in (None, "") else str(default)


def _default(field: dataclasses.Field) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _value(value: object) -> str:
    if value is dataclasses.MISSING:
        return "none; required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    spec = getattr(value, "spec", None)  # a layout is written as it is set
    return str(spec or value)


def _type(hint: Hint) -> str:
    names = []
    for kind in alternatives(hint):
        if typing.get_origin(kind) is typing.Literal:
            names += [str(choice) for choice in typing.get_args(kind)]
        elif kind is str:
            names.append("text")
        elif kind is not type(None) and not dataclasses.is_dataclass(kind):
            simple = {int: "integer", float: "number", bool: "true|false"}
            names.append(simple.get(kind, "(a, b, ...)"))
    return "|".join(names)
