"""Continue prompts: python -m experiments.generate --workdir=DIR --prompt='def '.

Decodes with the newest checkpoint of a training run and the tokenizer that it was trained with, or
with --model=FOLDER|file.gguf and the tokenizer that is there.
Prompts come from --prompt and --prompt_file; --chat holds a conversation instead. The flags are
vLLM's sampling parameters; with --beam_width it is beam search. Rates of prefill and decoding go to
standard error. Exit code 2 with one line for a mistake in the command.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any, Literal

from absl import flags

import fusedkv_jax as fkv
from experiments.common import chat, cli, models
from experiments.common.completions import continue_texts, counted_from_one
from fusedkv_jax.compression import names, parse
from fusedkv_jax.data import tokenizers
from fusedkv_jax.data.chat import read_text
from fusedkv_jax.generation import BeamSearchParams, Rates
from fusedkv_jax.generation.parts import Parts

FLAGS = flags.FLAGS

_SETTINGS = ("batch_size", "cache_dtype", "max_num_batched_tokens", "enable_prefix_caching")


def define_flags() -> None:
    """Define the flags of the run, one for each sampling parameter, and those of the output."""
    models.define_flags()
    flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
    flags.DEFINE_string(
        "prompt_file",
        None,
        "UTF-8 file of prompts, one a line; in a .jsonl file each line is a JSON string.",
    )
    flags.DEFINE_enum("format", "text", ["text", "json"], "Text, or one JSON document a prompt.")
    _define_sampling_flags()
    flags.DEFINE_integer("beam_width", 0, "Beams of beam search; 0 samples.", lower_bound=0)
    flags.DEFINE_float("length_penalty", 1.0, "Exponent of the length in a beam's score.")
    flags.DEFINE_enum(
        "early_stopping",
        "false",
        ["true", "false", "never"],
        "When beam search ends: with the first complete beams, once none is likely to beat them, "
        "or once none can.",
    )
    flags.DEFINE_integer("batch_size", 32, "Outputs decoded together at most.")
    flags.DEFINE_string("cache_dtype", None, "Storage type of the cache; default the model's.")
    flags.DEFINE_integer(
        "max_num_batched_tokens", None, "Prompt tokens that one step processes; default all."
    )
    flags.DEFINE_bool("enable_prefix_caching", True, "Prefill what all prompts begin with once.")
    flags.DEFINE_string(
        "compression",
        None,
        f"Compressor of the prompt's cache, such as snapkv:budget=256; {', '.join(names())}.",
    )
    flags.DEFINE_integer(
        "draft_tokens", 0, "Self-speculative decoding: tokens that the lower layers draft."
    )
    flags.DEFINE_integer("exit_layer", None, "Layers that draft; default those that cache.")
    flags.DEFINE_bool("adaptive_draft", False, "End a draft early where it is likely wrong.")
    cli.define_mesh()
    flags.DEFINE_string(
        "prefill_parts",
        None,
        "Prefill in parts over --mesh.context: equal, balanced, or relative sizes such as 3,2,2.",
    )
    chat.define_flags()
    _define_rules()


def _define_rules() -> None:
    """Which flags go together: sampling, beam search and conversations use different ones."""
    cli.only_with("exit_layer adaptive_draft", draft_tokens=True)
    cli.only_with("length_penalty early_stopping", beam_width=True)
    cli.only_with("logprobs prompt_logprobs", format="json")
    cli.only_with("prefill_parts", mesh=True)
    cli.only_with("system chat_template", chat=True)
    cli.only_with(
        "prompt prompt_file format beam_width batch_size enable_prefix_caching", chat=False
    )
    beams = {field.name for field in dataclasses.fields(fkv.BeamSearchParams)}
    sampling = {field.name for field in dataclasses.fields(fkv.SamplingParams)}
    cli.only_with(" ".join(sampling - beams), beam_width=False)


def run_settings() -> dict[str, Any]:
    """How to run, of the command line. Raises ValueError on a bad value."""
    settings = {name: FLAGS[name].value for name in _SETTINGS}
    settings["mesh"] = cli.load_mesh()
    if FLAGS.prefill_parts is not None:
        settings["prefill_parts"] = _parts(FLAGS.prefill_parts)
    if FLAGS.compression is not None:
        settings["compression"] = parse(FLAGS.compression)
    if FLAGS.draft_tokens:
        settings["speculation"] = fkv.SelfSpeculation(
            draft_tokens=FLAGS.draft_tokens,
            exit_layer=FLAGS.exit_layer,
            adaptive=FLAGS.adaptive_draft,
        )
    return settings


def _parts(text: str) -> Parts:
    if text in ("equal", "balanced"):
        return text
    try:
        return [float(size) for size in text.split(",")]
    except ValueError:
        raise ValueError(f"--prefill_parts={text}; use equal, balanced, or 3,2,2") from None


def _define_sampling_flags() -> None:
    default = fkv.SamplingParams()
    flags.DEFINE_integer("n", default.n, "Outputs for each prompt.")
    flags.DEFINE_integer("max_tokens", 128, "Tokens to generate at most.")
    flags.DEFINE_integer("min_tokens", default.min_tokens, "Tokens before the output may stop.")
    flags.DEFINE_float(
        "temperature", default.temperature, "0 takes the likeliest token; higher is more random."
    )
    flags.DEFINE_integer("top_k", default.top_k, "Draw from so many likeliest tokens; 0 is all.")
    flags.DEFINE_float(
        "top_p", default.top_p, "Draw from the likeliest tokens that hold this probability."
    )
    flags.DEFINE_float(
        "min_p", default.min_p, "Drop tokens less likely than this fraction of the likeliest."
    )
    flags.DEFINE_float(
        "repetition_penalty",
        default.repetition_penalty,
        "Above 1 makes tokens that the text already contains less likely.",
    )
    flags.DEFINE_float("frequency_penalty", 0.0, "Subtracted for each time the output has a token.")
    flags.DEFINE_float("presence_penalty", 0.0, "Subtracted if the output has a token.")
    flags.DEFINE_multi_string("logit_bias", [], "ID:BIAS, added to the logit of a token id.")
    flags.DEFINE_multi_string("bad_words", [], "Text that the output will not contain.")
    flags.DEFINE_multi_string("stop", [], "Text that ends the output.")
    flags.DEFINE_multi_integer("stop_token_ids", [], "Token that ends the output.")
    flags.DEFINE_bool("ignore_eos", default.ignore_eos, "Go on after the end of a document.")
    flags.DEFINE_bool("include_stop_str_in_output", False, "Keep the stop text in the output.")
    flags.DEFINE_integer("seed", None, "Makes the output reproducible; default a new one.")
    flags.DEFINE_integer("logprobs", None, "Log-probabilities of so many tokens (--format=json).")
    flags.DEFINE_integer("prompt_logprobs", None, "The same for the prompt (--format=json).")
    flags.DEFINE_bool("skip_special_tokens", True, "Leave special tokens out of the text.")


def sampling_params() -> fkv.SamplingParams:
    """The parameters of the command line. Raises ValueError on a bad value."""
    names = [f.name for f in dataclasses.fields(fkv.SamplingParams) if f.name in FLAGS]
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    bias = {}
    for entry in values["logit_bias"] or ():
        token, _, number = entry.partition(":")
        try:
            key, value = int(token), float(number)
        except ValueError:
            raise ValueError(f"--logit_bias={entry!r}; write ID:BIAS, such as 42:-5") from None
        if key in bias:
            raise ValueError(f"--logit_bias names token {key} twice; name it once")
        bias[key] = value
    return fkv.SamplingParams(**{**values, "logit_bias": bias})


def read_prompts() -> list[str]:
    """The prompts of --prompt and --prompt_file. Raises ValueError if there are none."""
    prompts = list(FLAGS.prompt)
    if FLAGS.prompt_file is not None:
        path = cli.check_readable(FLAGS.prompt_file)
        text = read_text(path).removeprefix("\ufeff").replace("\r\n", "\n")  # of Windows
        for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
            if path.suffix == ".jsonl":
                line = _json_string(path, number, line)
            prompts.append(line)
    if not prompts:
        raise ValueError("--prompt is missing; give the text to continue, or --prompt_file")
    return prompts


def _json_string(path: pathlib.Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, str):
        raise ValueError(f'{path}: line {number} is not a JSON string, such as "def f(x):\\n"')
    return value


class LiveRates:
    """Shows rates on standard error: all the time in a terminal, elsewhere once at the end."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._last: Rates | None = None

    def __call__(self, rates: Rates) -> None:
        self._last = rates
        if self._live:
            print(f"\r\033[K{rates}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last figures."""
        if self._last is not None:
            print("" if self._live else self._last, file=sys.stderr, flush=True)


def main() -> None:
    # Before the model is read, so that a bad value is reported at once.
    params = sampling_params()
    early: dict[str, bool | Literal["never"]] = {"true": True, "false": False, "never": "never"}
    beams = None
    if FLAGS.beam_width:
        beams = BeamSearchParams(
            beam_width=FLAGS.beam_width,
            n=params.n,
            max_tokens=params.max_tokens or 1,
            length_penalty=FLAGS.length_penalty,
            early_stopping=early[FLAGS.early_stopping],
            ignore_eos=params.ignore_eos,
            stop_token_ids=params.stop_token_ids,
        )
    prompts = [] if FLAGS.chat else read_prompts()
    settings = run_settings()
    loaded = models.load(settings["mesh"])
    model, tokenizer = loaded.model, tokenizers.load(loaded.config.data.tokenizer)
    if FLAGS.chat:
        chat.converse(model, tokenizer, params, settings)
        return
    rates = LiveRates()
    if beams is not None:
        with counted_from_one(prompts):
            completions = fkv.beam_search(model, prompts, beams, tokenizer=tokenizer, **settings)
    else:
        settings["progress"] = rates
        completions = continue_texts(model, tokenizer, prompts, params, **settings)
    rates.close()
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
        if FLAGS.format == "json":
            print(json.dumps({"prompt": prompt, **dataclasses.asdict(completion)}))
            continue
        for output in completion.outputs:
            which = "" if len(completion.outputs) == 1 else f", output {output.index + 1}"
            print(
                f"=== {loaded.title}, prompt {number} of {len(prompts)}{which}: "
                f"{len(output.token_ids)} tokens, ended by {output.finish_reason}"
            )
            print(f"{prompt}{output.text}")


# Not at import: other binaries have flags of the same names, and one of them imports this file.
if __name__ == "__main__":
    define_flags()
    cli.run(main)
