"""Serve a model under the OpenAI API: python -m experiments.serve --workdir=DIR.

The newest checkpoint of a training run, or --model=FOLDER|file.gguf. The routes
are /v1/completions, /v1/chat/completions, /v1/models, /tokenize, /detokenize, /health, /ready,
/metrics, /version, /kv_event_sources, and / with a page to chat in; names of flags are vLLM's.
After SIGTERM it takes no new requests and waits for those that run. Needs the extra `serve`. Exit
code 2 with one line for a mistake in the command.
"""

import importlib.util
import logging
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

import fusedkv_jax as fkv
from experiments.common import chat, cli, models
from fusedkv_jax import serving
from fusedkv_jax.compression import names, parse
from fusedkv_jax.data import tokenizers
from fusedkv_jax.data.chat import ChatError, ChatTemplate, read_text

if TYPE_CHECKING:
    from fusedkv_jax.server.kv_events import KvEventPublisher

FLAGS = flags.FLAGS

_log = logging.getLogger("fusedkv_jax.serve")
_SETTINGS = (
    *("tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"),
    *("page_size", "num_pages", "gpu_memory_utilization", "host_pages", "cache_dtype", "memory"),
    *("max_output_len", "enable_prefix_caching", "async_scheduling", "policy"),
)
_LIBRARIES = ("msgspec", "prometheus_client", "starlette", "uvicorn")


def define_flags() -> None:
    """Define the flags of the model, the engine, and the server."""
    models.define_flags()
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all.")
    flags.DEFINE_integer("port", 8000, "Port to listen on; 0 takes a free one.", 0, 65535)
    flags.DEFINE_string("served_model_name", None, "What clients call the model.")
    flags.DEFINE_multi_string("api_key", [], "Key of a client; may be repeated. Others see it.")
    flags.DEFINE_string(
        "api_key_file", None, "Keys, one a line; with FUSEDKV_API_KEY none is on the command line."
    )
    flags.DEFINE_string("chat_template", None, "Jinja file; default the tokenizer's own.")
    flags.DEFINE_integer("tensor_parallel_size", 1, "Devices that share every step.", 1)
    flags.DEFINE_integer("max_num_seqs", 64, "Requests in a step.", 1)
    flags.DEFINE_integer("max_num_batched_tokens", 512, "Tokens in a step.", 1)
    flags.DEFINE_integer("max_model_len", None, "Tokens of a request; default the model's.", 1)
    flags.DEFINE_integer("page_size", 16, "Tokens of a page.", 1)
    flags.DEFINE_integer("num_pages", None, "Pages of the cache; default what memory holds.", 1)
    flags.DEFINE_float("gpu_memory_utilization", 0.9, "Part of the device's memory to use.")
    flags.DEFINE_integer("host_pages", 0, "Pages of a second pool in host memory.", 0)
    flags.DEFINE_string("cache_dtype", None, "Storage type of the cache; default the model's.")
    flags.DEFINE_enum(
        "memory",
        "auto",
        ["auto", "pages", "slots"],
        "How caches lie; default what the model allows.",
    )
    flags.DEFINE_string(
        "compression",
        None,
        f"Compressor of prompts' caches, such as snapkv:budget=256; {', '.join(names())}.",
    )
    flags.DEFINE_integer(
        "max_output_len",
        None,
        "Tokens of an output beside a compressed prompt; default a quarter.",
        1,
    )
    flags.DEFINE_bool("enable_prefix_caching", True, "Share pages of prompts that begin alike.")
    flags.DEFINE_bool("async_scheduling", True, "Plan each step while the one before it runs.")
    flags.DEFINE_enum(
        "speculation",
        None,
        ["ngram", "self"],
        "Guess tokens and check several in a step: ngram looks them up, self drafts with the lower"
        " layers.",
    )
    flags.DEFINE_integer("draft_tokens", 4, "Tokens of a guess.", 1)
    flags.DEFINE_integer("exit_layer", None, "Layers that draft; default those that cache.", 1)
    flags.DEFINE_bool("adaptive_draft", False, "End a draft early where it is likely wrong.")
    flags.DEFINE_integer("prompt_lookup_min", 2, "Last tokens that must have occurred before.", 1)
    flags.DEFINE_integer("prompt_lookup_max", 4, "As many of them as possible, up to these.", 1)
    cli.only_with("draft_tokens", speculation=True)
    cli.only_with("prompt_lookup_min prompt_lookup_max", speculation="ngram")
    cli.only_with("exit_layer adaptive_draft", speculation="self")
    flags.DEFINE_enum("policy", "fcfs", sorted(serving.POLICIES), "Who comes first.")
    flags.DEFINE_integer("max_queued", 1024, "Requests that may wait; further ones get a 503.", 1)
    flags.DEFINE_integer("max_queued_tokens", None, "Tokens of their prompts; default any.", 1)
    flags.DEFINE_integer("max_body_bytes", 8 << 20, "Bytes of a request.", 1)
    flags.DEFINE_string(
        "kv_events_config",
        None,
        'Tell routers what is cached: vLLM\'s JSON, such as {"endpoint": "tcp://*:5557"}.',
    )
    flags.DEFINE_float("shutdown_timeout", 30.0, "Seconds to finish requests in at the end.", 0.0)


def main() -> None:
    if missing := [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{missing[0]} is missing; install the extra: pip install '.[serve]'")
    from fusedkv_jax.server import Server, ServerSettings, listen, run

    chosen: dict[str, Any] = {name: FLAGS[name].value for name in _SETTINGS}
    if FLAGS.compression is not None:
        chosen["compression"] = parse(FLAGS.compression)
    settings = serving.ServingSettings(**chosen, speculation=_speculation())
    limits = ServerSettings(api_keys=_keys(), max_body_bytes=FLAGS.max_body_bytes)
    kv_events = _kv_events()
    sock = listen(FLAGS.host, FLAGS.port)  # before the model is read
    loaded = models.load()
    tokenizer = tokenizers.load(loaded.config.data.tokenizer)
    template = _template(tokenizer)
    _log_to_stderr()
    engine = serving.Engine(loaded.model, tokenizer, settings)
    _log.info("%s: compiling", loaded.title)
    _log.info("%d programs are compiled", engine.warm_up())
    front = serving.AsyncEngine(
        engine,
        model_name=FLAGS.served_model_name or loaded.config.name,
        max_queued=FLAGS.max_queued,
        max_queued_tokens=FLAGS.max_queued_tokens,
        on_changes=None if kv_events is None else kv_events.publish,
    )
    run(Server(front, template, limits, kv_events), sock, FLAGS.shutdown_timeout)


def _speculation() -> "fkv.NGramSpeculation | fkv.SelfSpeculation | None":
    """How tokens are guessed, of the command line. Raises ValueError."""
    if FLAGS.speculation == "ngram":
        return fkv.NGramSpeculation(
            draft_tokens=FLAGS.draft_tokens,
            prompt_lookup_min=FLAGS.prompt_lookup_min,
            prompt_lookup_max=FLAGS.prompt_lookup_max,
        )
    if FLAGS.speculation == "self":
        return fkv.SelfSpeculation(
            draft_tokens=FLAGS.draft_tokens,
            exit_layer=FLAGS.exit_layer,
            adaptive=FLAGS.adaptive_draft,
        )
    return None


def _log_to_stderr() -> None:
    """Show our own log, and libraries' warnings among it in the same form."""
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(stream=sys.stderr, format=form, force=True)
    logging.getLogger("fusedkv_jax").setLevel(logging.INFO)


def _keys() -> list[str]:
    """Keys of the command line, the file and the environment. Raises ValueError."""
    from fusedkv_jax.server import environment_keys

    keys = list(FLAGS.api_key)
    if FLAGS.api_key_file is not None:
        path = cli.check_readable(FLAGS.api_key_file)
        found = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if not found:
            raise ValueError(f"{path}: there is no key in it; write one a line")
        keys += found
    return keys + environment_keys()


def _kv_events() -> "KvEventPublisher | None":
    """Who tells what is cached, if anybody wants it. Raises ValueError."""
    if FLAGS.kv_events_config is None:
        return None
    from fusedkv_jax.server.kv_events import KvEventPublisher, KvEventsConfig

    config = KvEventsConfig.decode(FLAGS.kv_events_config)
    if importlib.util.find_spec("zmq") is None:
        raise ValueError("pyzmq is missing; install fusedkv_jax with its extra 'kv-events'")
    return KvEventPublisher(config)


def _template(tokenizer: tokenizers.Tokenizer) -> ChatTemplate | None:
    """The chat template; None, and a line that says why, for a model without one."""
    file = FLAGS.chat_template
    try:
        return chat.load_template(tokenizer, file)
    except ChatError as error:
        if file is not None:
            raise
        print(f"/v1/chat/completions will refuse requests: {error}", file=sys.stderr)
        return None


if __name__ == "__main__":
    define_flags()
    cli.run(main)
