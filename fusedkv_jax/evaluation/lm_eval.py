"""lm-evaluation-harness: its tasks on a model of ours, under the name `fusedkv_jax`.

    python -m fusedkv_jax.evaluation.lm_eval --model fusedkv_jax --model_args workdir=DIR --tasks T

is the command `lm_eval` with this model known to it; all flags are lm-eval's. Releases of lm-eval
that look for models in installed packages find it by its entry point, so that `lm_eval` will do.

The harness: https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from fusedkv_jax import interop, training
from fusedkv_jax.data import tokenizers
from fusedkv_jax.data.chat import ChatError, load_template
from fusedkv_jax.generation import SamplingParams, generate
from fusedkv_jax.model import Decoder

_BATCH_SIZE = 8  # for batch_size=auto
_LOGITS = 1 << 25  # float32 logits that are held at once
_SHORTEST = 32  # tokens that rows are padded to at least
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


@register_model("fusedkv_jax")
class FusedKV(TemplateLM):
    """A model of ours as lm-eval runs it: log-likelihoods by the full path, text by `generate`.

    Args:
        workdir: a training run, or
        model: a Hugging Face folder or a GGUF file.
        step: checkpoint of `workdir`; default the newest.
        tokenizer: path of the tokenizer; default the model's own.
        add_bos_token: texts begin with BOS. By default they do for a training run, as documents do
            in training, and for another's model if its tokenizer says so.
        max_length: tokens of a context and its continuation; default the model's own.
        max_gen_toks: tokens to generate where a task does not say.
        batch_size: rows that are computed together; `auto` is 8.
        max_batch_size, device: not used; lm-eval always passes them, with `cuda:0` for a device.
            JAX_PLATFORMS chooses it.

    Raises:
        ValueError: a value that does not fit, or what loading raises.
    """

    def __init__(
        self,
        workdir: str | None = None,
        model: str | None = None,
        step: int | None = None,
        tokenizer: str | None = None,
        add_bos_token: bool | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if (workdir is None) == (model is None) or (step is not None and workdir is None):
            raise ValueError("name workdir=DIR (and a step of it), or model=FOLDER or FILE.gguf")
        if add_bos_token not in (None, True, False):  # lm-eval leaves "no" as it is, which is true
            raise ValueError(f"add_bos_token={add_bos_token!r}; use True or False")
        self._files = tempfile.TemporaryDirectory()  # a GGUF file's tokenizer
        self._model, own = _load(workdir, model, step, self._files.name)
        self._place = tokenizer or own
        self._tokenizer = tokenizers.load(self._place)
        tokenizers.check_vocab_size(self._tokenizer, self._model.config.vocab_size)
        self._is_run = workdir is not None
        self.add_bos_token = self._is_run or _adds_bos(self._place)
        if add_bos_token is not None:
            self.add_bos_token = bool(add_bos_token)
        longest = self._model.config.max_length
        self.max_length = longest if max_length is None else int(max_length)
        if not 2 <= self.max_length <= longest:
            raise ValueError(f"max_length={max_length}; the model takes 2 to {longest}")
        self.max_gen_toks = int(max_gen_toks)
        self.batch_size = _BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; use 1 or more, or auto")
        self._score = functools.partial(_score, *nnx.split(self._model))

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is conditioned on."""
        return self._tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text. What spells a special token is one, as in a rendered chat template.

        Args:
            string: the text.
            add_special_tokens: begin with BOS; by default as `add_bos_token` says, and not twice.
        """
        ids = list(self._tokenizer.encode(string, allow_special=True))
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token and ids[:1] != [self.prefix_token_id]
        return [self.prefix_token_id, *ids] if add_special_tokens else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it.

        Args:
            requests: (context and continuation as texts, or None; their tokens each).
        """
        # The last token is scored, never read; what is too long loses its beginning.
        # A context of spaces alone has no tokens where texts do not begin with BOS: lm-eval has
        # moved the spaces to the continuation, which follows what no context stands for.
        rows = [
            [*(context or [self.prefix_token_id]), *new][-self.max_length - 1 :]
            for _, context, new in requests
        ]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with tqdm(total=len(rows), disable=disable_tqdm, desc="log-likelihoods") as progress:
            for start in range(0, len(rows), self.batch_size):
                batch = order[start : start + self.batch_size]
                scores, likeliest = self._scores([rows[i] for i in batch])
                for row, i in enumerate(batch):
                    text, _, new = requests[i]
                    if not 0 < len(new) <= self.max_length:
                        raise ValueError(
                            f"a continuation has {len(new)} tokens; 1 to {self.max_length} fit"
                        )
                    own = np.s_[row, len(rows[i]) - 1 - len(new) : len(rows[i]) - 1]
                    answers[i] = float(scores[own].sum()), bool(likeliest[own].all())
                    if text is not None:  # not a window of a longer text
                        self.cache_hook.add_partial("loglikelihood", text, answers[i])
                progress.update(len(batch))
        return answers

    def _scores(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """For rows of tokens, longest first, at every place: the next one's log-probability, and
        whether it is the likeliest."""
        width = min(max(_SHORTEST, 1 << (len(rows[0]) - 2).bit_length()), self.max_length)
        tokens = np.zeros((self.batch_size, width + 1), np.int32)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
        return jax.device_get(self._score(tokens[:, :-1], tokens[:, 1:]))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's length that do not overlap."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            # lm-eval's own models condition on BOS and score the one that a tokenizer adds, too.
            # Models trained here have never seen two.
            ids = self.tok_encode(request.args[0], False if self._is_run else None)
            found = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for context, new in map(make_disjoint_window, found):
                windows.append((None, context, new))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (value, _) in zip(owners, scores, strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Texts that continue contexts, up to what ends them."""
        params = [self._params(request.args[1]) for request in requests]
        prompts = []
        for request, each in zip(requests, params, strict=True):
            ids = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            prompts.append(ids[-(self.max_length - each.max_tokens) :])
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        texts = [""] * len(prompts)
        with tqdm(total=len(prompts), disable=disable_tqdm, desc="texts") as progress:
            for start in range(0, len(prompts), self.batch_size):
                batch = order[start : start + self.batch_size]
                completions = generate(
                    self._model,
                    [prompts[i] for i in batch],
                    [params[i] for i in batch],
                    tokenizer=self._tokenizer,
                    batch_size=self.batch_size,
                )
                for i, completion in zip(batch, completions, strict=True):
                    texts[i] = completion.outputs[0].text or ""
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                progress.update(len(batch))
        return texts

    def _params(self, asked: dict[str, Any]) -> Any:
        given: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        most, stops = given.pop("max_gen_toks"), [text for text in given.pop("until") if text]
        if not given.pop("do_sample"):
            given = {name: value for name, value in given.items() if name not in _SAMPLING[:4]}
            given["temperature"] = 0.0
        unknown = sorted(set(given) - set(_SAMPLING))
        if unknown:
            raise ValueError(f"generation_kwargs has {', '.join(unknown)}, which are not supported")
        if not 0 < most < self.max_length:
            raise ValueError(f"max_gen_toks={most}; the context holds {self.max_length} tokens")
        # An end that is written as ordinary text ends it, too.
        end = self._tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        return SamplingParams(max_tokens=most, stop=[*stops, *([end] if end else [])], **given)

    @property
    def tokenizer_name(self) -> str:
        """For the names of lm-eval's cache files."""
        return str(self._place).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, if one is to be applied; None if not, or if it has none."""
        if chat_template is False or chat_template is None:
            return None
        try:
            return load_template(self._place).source
        except ChatError:
            return None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation; without a generation prompt, the last message goes on."""
        template = load_template(self._place)
        text = template.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        place = text.rfind(last)
        if place < 0:  # templates may strip a message
            last = last.strip()
            place = text.rfind(last)
        if place < 0:
            raise ChatError("the chat template does not show the message that is to go on")
        return text[: place + len(last)]


def _load(
    workdir: str | None, model: str | None, step: int | None, files: str
) -> tuple[Decoder, str]:
    """The model, and the path of its tokenizer; that of a GGUF file is written to `files`."""
    if workdir is not None:
        found, config, _ = training.load_model(workdir, step)
        return found, config.data.tokenizer
    place = pathlib.Path(str(model)).expanduser()
    if place.suffix != ".gguf":
        return interop.load_huggingface(place), str(place)
    interop.save_gguf_tokenizer(place, files)
    return interop.load_gguf(place), files


def _adds_bos(tokenizer: str) -> bool:
    """Whether a tokenizer begins texts with BOS: by its configuration, else by its file."""
    if tokenizer == "byte":
        return True
    from tokenizers import Tokenizer

    place = pathlib.Path(tokenizer).expanduser()
    file = place / "tokenizer.json" if place.is_dir() else place
    beside = file.parent / "tokenizer_config.json"
    named = json.loads(beside.read_bytes()).get("add_bos_token") if beside.is_file() else None
    if named is not None:
        return bool(named)
    return Tokenizer.from_file(str(file)).encode("").ids[:1] == [tokenizers.load(tokenizer).bos_id]


@functools.partial(jax.jit, static_argnums=0)
def _score(
    graph: nnx.GraphDef[Decoder], params: nnx.State, tokens: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target [B, T], and whether it is the likeliest token."""
    model = nnx.merge(graph, params)
    hidden = model.hidden(tokens)

    def one(place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, target = place
        logits = model.logits(x[None])[0]
        return jax.nn.log_softmax(logits)[target], jnp.argmax(logits) == target

    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    at_once = max(1, _LOGITS // model.config.vocab_size)
    scores, likeliest = jax.lax.map(one, flat, batch_size=min(at_once, flat[1].size))
    return scores.reshape(targets.shape), likeliest.reshape(targets.shape)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
