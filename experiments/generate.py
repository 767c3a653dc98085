"""Continue prompts: python -m experiments.generate --workdir=DIR --prompt='def '.

Decodes with the newest checkpoint of a training run and the tokenizer that it was trained with.
The flags are vLLM's sampling parameters. Exit code 2 with one line for a mistake in the command.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

import fusedkv_jax as fkv
from experiments import cli
from fusedkv_jax.data import Tokenizer, tokenizers
from fusedkv_jax.training import load_model

_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_tokens",
    "seed",
    "ignore_eos",
)


def continue_texts(
    model: fkv.Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    params: fkv.SamplingParams,
) -> list[fkv.Completion]:
    """Completions of texts, each taken as the beginning of a document: after the BOS token,
    as in training.

    Raises:
      ValueError: an empty prompt, or one that leaves no room for output in the model's context.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; give --prompt at least one character")
        length = 1 + len(tokenizer.encode(prompt))
        if length >= model.config.max_length:
            raise ValueError(
                f"prompt {number} is {length} tokens long with its BOS token, and the model's "
                f"context of {model.config.max_length} leaves no room for output; shorten it"
            )
    tokens = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    return fkv.generate(model, tokens, params, tokenizer=tokenizer)


def define_flags() -> None:
    """Define --workdir, --step, --prompt and one flag for each sampling parameter."""
    default = fkv.SamplingParams()
    flags.DEFINE_string("workdir", None, "Directory of a training run.")
    flags.DEFINE_integer("step", None, "Checkpoint to use; default the newest.", lower_bound=1)
    flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
    flags.DEFINE_integer("max_tokens", 128, "Tokens to generate at most.")
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
    flags.DEFINE_integer("seed", None, "Makes the output reproducible; default a new one.")
    flags.DEFINE_bool("ignore_eos", default.ignore_eos, "Go on after the end of a document.")


def main() -> None:
    workdir, prompts = cli.require("workdir"), flags.FLAGS.prompt
    if not prompts:
        raise ValueError("--prompt is missing; give the text to continue")
    # Before the model is read, so that a bad value is reported at once.
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in _SAMPLING}
    params = fkv.SamplingParams(**values)
    model, config, step = load_model(workdir, flags.FLAGS.step)
    tokenizer = tokenizers.load(config.data.tokenizer)
    completions = continue_texts(model, tokenizer, prompts, params)
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
        print(
            f"=== {config.name} at step {step}, prompt {number} of {len(prompts)}: "
            f"{len(completion.token_ids)} tokens, ended by {completion.finish_reason}"
        )
        print(f"{prompt}{completion.text}")


# Not at import: other binaries have flags of the same names, and one of them imports this file.
if __name__ == "__main__":
    define_flags()
    cli.run(main)
