"""A conversation in the terminal: python -m experiments.generate --workdir=DIR --chat."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

import fusedkv_jax as fkv
from experiments.common import cli
from fusedkv_jax.data import Tokenizer, chat
from fusedkv_jax.data.chat import ChatError, ChatTemplate
from fusedkv_jax.data.chat_encoding import encode_chat
from fusedkv_jax.data.tokenizers import ByteTokenizer
from fusedkv_jax.generation import Rates

FLAGS = flags.FLAGS

_HELP = "An empty line or the end of the input leaves, /reset begins a new conversation."


def define_flags() -> None:
    """Define --chat, --system and --chat_template."""
    flags.DEFINE_bool("chat", False, "Hold a conversation; the model's turns are streamed.")
    flags.DEFINE_string("system", None, "System message of --chat.")
    flags.DEFINE_string(
        "chat_template", None, "Jinja file with the chat template; default the tokenizer's own."
    )


def load_template(tokenizer: Tokenizer, file: str | None) -> ChatTemplate:
    """The chat template of a file, or else the tokenizer's own.

    Raises:
      ValueError: the file cannot be read, or the tokenizer has none.
    """
    if file is not None:
        return ChatTemplate(chat.read_text(cli.check_readable(file)), _special(tokenizer))
    if isinstance(tokenizer, ByteTokenizer):  # its name is no path
        raise ChatError("the byte tokenizer has no chat template; give --chat_template")
    return chat.load_template(tokenizer.name)


def converse(
    model: fkv.Decoder,
    tokenizer: Tokenizer,
    params: fkv.SamplingParams,
    settings: dict[str, Any],
) -> None:
    """Read messages from standard input and stream the answers to standard output.

    Raises:
      ValueError: there is no chat template. What is wrong with a single message is printed.
    """
    template = load_template(tokenizer, FLAGS.chat_template)
    system = FLAGS.system
    beginning = [] if system is None else [{"role": "system", "content": system}]
    messages = list(beginning)
    print(_HELP, file=sys.stderr)
    while (text := _read()) is not None:
        if text == "/reset":
            messages = list(beginning)
            continue
        asked = [*messages, {"role": "user", "content": text}]
        try:
            answer = _answer(model, tokenizer, template, asked, params, settings)
        except ValueError as error:  # The conversation goes on without this message.
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]


def _answer(
    model: fkv.Decoder,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: list[dict[str, str]],
    params: fkv.SamplingParams,
    settings: Mapping[str, Any],
) -> str:
    prompt = encode_chat(tokenizer, template, messages)
    last = Rates()

    def keep(rates: Rates) -> None:
        nonlocal last
        last = rates

    text = ""
    try:
        for delta in fkv.stream(
            model, [prompt], params, tokenizer=tokenizer, progress=keep, **settings
        ):
            text += delta.text or ""
            print(delta.text, end="", flush=True)
    except KeyboardInterrupt:  # ends the answer, not the conversation
        cli.interrupt_answered()
    print(flush=True)
    print(last, file=sys.stderr, flush=True)
    return text


def _read() -> str | None:
    """The next message; None at the end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") or None


def _special(tokenizer: Tokenizer) -> dict[str, str]:
    """Special tokens that a template may name, as their texts."""
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {
        name: tokenizer.decode([token], skip_special_tokens=False) for name, token in names.items()
    }
