"""`LLM`: an engine for prompts that are all there, with the names of vLLM's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fusedkv_jax.data.chat import ChatTemplate, Message
from fusedkv_jax.data.chat_encoding import encode_chat
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.generation.requests import PromptError, TokenizerLike
from fusedkv_jax.generation.results import Completion, Output, PlaceLogprobs
from fusedkv_jax.model import Decoder
from fusedkv_jax.serving.engine import Engine
from fusedkv_jax.serving.intake import AnyPrompt
from fusedkv_jax.serving.output import OutputDelta
from fusedkv_jax.serving.settings import ServingSettings


class LLM:
    """A model behind a serving engine: continuous batching, over paged caches with prefix reuse.

    Greedy outputs and seeded draws are those of `fkv.generate`. Pages of prompts that have ended
    stay as long as there is room, so later calls find their prefixes computed. What cannot lie
    in pages (cyclic layouts, int4, compressed prompts) is served from slots, a row of a contiguous
    cache for each request; a line of the log says which it is and why.

    Args:
        model: the model.
        tokenizer: encodes prompts and decodes outputs; None where prompts are token ids.
        template: makes the prompts of `chat`, as `fusedkv_jax.data.chat.load_template` reads it.
        **settings: how to serve, see `ServingSettings`: max_num_seqs, max_num_batched_tokens,
            max_model_len, tensor_parallel_size, page_size, num_pages, kv_cache_memory_bytes,
            gpu_memory_utilization, host_pages, cache_dtype, memory, compression, max_output_len,
            enable_prefix_caching, speculation, async_scheduling, policy, max_logprobs, eos_id,
            add_special_tokens, shapes.

    Attributes:
        engine: what runs.

    Raises:
        ValueError: a setting out of bounds, or one that the model cannot have.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        tokenizer: TokenizerLike | None = None,
        template: ChatTemplate | None = None,
        **settings: Any,
    ):
        known = ServingSettings.__dataclass_fields__
        unknown = next((name for name in settings if name not in known), None)
        if unknown == "speculative_config":
            raise ValueError("speculative_config: use speculation=fkv.NGramSpeculation(...)")
        if unknown is not None:
            raise ValueError(f"LLM has no setting {unknown!r}; it has {', '.join(known)}")
        self.engine = Engine(model, tokenizer, ServingSettings(**settings))
        self.template = template

    def warm_up(self) -> int:
        """Compile the programs of all steps; their number. After it nothing is compiled."""
        return self.engine.warm_up()

    def generate(
        self,
        prompts: Sequence[AnyPrompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continue prompts.

        All are checked before anything runs.

        Args:
            prompts: texts (with a tokenizer), or token ids.
            params: one for all prompts, or one for each; by default `SamplingParams()`.

        Returns:
            One completion per prompt, in order.

        Raises:
            ValueError: a prompt that can never be served; the message names the limit.
            PromptError: the model's logits are not finite for a prompt, or a step failed.
        """
        if isinstance(prompts, str | bytes):
            raise ValueError(f"prompts is one {type(prompts).__name__}; pass a list of prompts")
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling parameters for {len(prompts)} prompts")
        names = [f"prompt {number}" for number in range(len(prompts))]
        checked = [
            self.engine.check(prompt, own, name)
            for prompt, own, name in zip(prompts, params, names, strict=True)
        ]
        found: dict[str, dict[int, list[OutputDelta]]] = {name: {} for name in names}
        try:
            for prompt, name in zip(checked, names, strict=True):
                self.engine.put(prompt, name)
            while self.engine.unfinished:
                for name, delta in self.engine.step():
                    if delta.error is not None:
                        raise PromptError(f"{name} {delta.error}")
                    found[name].setdefault(delta.index, []).append(delta)
        finally:
            for name in names:  # where something was raised
                self.engine.abort(name)
        with_text = self.engine.tokenizer is not None
        return [
            Completion(
                prompt.prompt,
                tuple(_output(found[name][i], with_text) for i in sorted(found[name])),
                _prompt_logprobs(found[name]),
            )
            for prompt, name in zip(checked, names, strict=True)
        ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer one conversation or several; each is a sequence of messages.

        Raises:
            ChatError: the template refuses a conversation. ValueError, PromptError: as `generate`.
        """
        if self.template is None or self.engine.tokenizer is None:
            raise ValueError("chat needs a tokenizer and a template; pass both to LLM")
        several = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            encode_chat(self.engine.tokenizer, self.template, list(conversation))  # type: ignore[arg-type]
            for conversation in several
        ]
        return self.generate(prompts, params)


def _prompt_logprobs(found: Mapping[int, list[OutputDelta]]) -> list[PlaceLogprobs | None] | None:
    """Those of the one delta that has them."""
    deltas = itertools.chain.from_iterable(found.values())
    scores = (delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None)
    first = next(scores, None)
    return None if first is None else list(first)


def _output(deltas: Sequence[OutputDelta], with_text: bool) -> Output:
    """An output, of all its deltas."""
    last = deltas[-1]
    assert last.finish_reason is not None
    tokens = tuple(itertools.chain.from_iterable(d.token_ids for d in deltas))
    logprobs, total = None, None
    if any(d.logprobs is not None for d in deltas):
        logprobs = [place for d in deltas for place in d.logprobs or ()]
        total = sum(place[token].logprob for token, place in zip(tokens, logprobs, strict=True))
    text = "".join(d.text for d in deltas) if with_text else None
    return Output(last.index, text, tokens, last.finish_reason, last.stop_reason, total, logprobs)
