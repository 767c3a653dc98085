"""Prompts in, jobs out: everything is checked before a request is queued."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.generation.requests import Codec, PromptError, make_requests
from fusedkv_jax.generation.requests import PreparedRequest as Prompt
from fusedkv_jax.generation.tracker import Tracker
from fusedkv_jax.serving.draws import check_lists
from fusedkv_jax.serving.grammars import Grammars
from fusedkv_jax.serving.job import Growing, Job
from fusedkv_jax.serving.request import Request, RequestError

AnyPrompt = str | Sequence[int] | np.ndarray  # a text, or token ids


class Whose(NamedTuple):
    """Who asks.

    Attributes:
        priority: lower is more urgent.
        tenant: tenants share no cached prefixes.
        client: who shares fairly with others.
    """

    priority: int
    tenant: str
    client: str


@dataclass(frozen=True)
class Intake:
    """What a request is checked against, and made with.

    Attributes:
        config: of the model.
        codec: encodes prompts and decodes outputs.
        grammars: compiles those of structured outputs.
        max_model_len: tokens that a request can come to.
        max_logprobs: likeliest tokens that it may ask for.
        max_output_len: tokens that an output can come to, where prompts are compressed.
    """

    config: ModelConfig
    codec: Codec
    grammars: Grammars
    max_model_len: int
    max_logprobs: int
    max_output_len: int | None = None

    def check(self, name: str, prompt: AnyPrompt, params: SamplingParams) -> Prompt:
        """A prompt that can be served; touches nothing, so any thread may ask.

        Raises:
            RequestError: it cannot; the message says why, and names the limit.
        """
        plain = dataclasses.replace(params, structured_outputs=None)  # not for `fkv.generate`
        try:
            (checked,), _ = make_requests(self.config, [prompt], plain, self.codec)
        except PromptError as error:
            raise RequestError(name, error.reason) from None
        most = self.max_logprobs
        for field in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, field)
            if wanted is not None and not 0 <= wanted <= most:
                reason = f"has {field}={wanted}; use 0 to max_logprobs={most}"
                raise RequestError(name, reason, field)
        size = len(checked.prompt) + (params.max_tokens or 1)
        if size > self.max_model_len:
            raise RequestError(
                name,
                f"can come to {size} tokens, prompt {len(checked.prompt)} and max_tokens together;"
                f" max_model_len={self.max_model_len} is the limit",
            )
        try:
            check_lists(checked)
        except ValueError as error:
            raise RequestError(name, f"is refused: {error}") from None
        if params.structured_outputs is not None:
            try:
                self.grammars.check(params.structured_outputs)
            except ValueError as error:
                raise RequestError(name, f"is refused: {error}", "structured_outputs") from None
        limit = min(checked.limit, self.max_model_len)
        if self.max_output_len is not None:
            self._check_compressed(name, params)
            limit = min(limit, len(checked.prompt) + self.max_output_len)
        return dataclasses.replace(checked, params=params, limit=limit)

    def _check_compressed(self, name: str, params: SamplingParams) -> None:
        """Raises RequestError for what a compressor leaves no room for."""
        most = self.max_output_len
        if params.max_tokens is not None and most is not None and params.max_tokens > most:
            reason = f"has max_tokens={params.max_tokens}; max_output_len={most} is the limit"
            raise RequestError(name, reason, "max_tokens")
        if params.prompt_logprobs is not None:
            reason = "has prompt_logprobs, which need all of a prompt; this engine compresses them"
            raise RequestError(name, reason, "prompt_logprobs")

    def job(self, name: str, prompt: Prompt, arrival: float, whose: Whose) -> Job:
        """The job of a checked prompt.

        Args:
            name: what the caller calls it.
            prompt: the prompt.
            arrival: as `Request` has it.
            whose: who asks.
        """
        params = prompt.params
        job = Job(name, prompt, decode=self.codec.decoder(params.skip_special_tokens))
        scored = params.prompt_logprobs is not None and not job.is_scored
        seed = secrets.randbits(32) if params.seed is None else params.seed
        form = params.structured_outputs
        for index in range(params.n):
            request = Request(
                name if params.n == 1 else f"{name}/{index}",
                np.asarray(prompt.prompt, np.int32),
                prompt.limit - len(prompt.prompt),
                arrival=arrival,
                client=whose.client,
                priority=whose.priority,
                salt=whose.tenant,
                scored=scored and index == 0,
            )
            job.outputs.append(
                Growing(
                    Tracker(prompt, index, self.codec, piecewise=True),
                    dataclasses.replace(params, seed=(seed + index) % 2**32),
                    request,
                    None if form is None else self.grammars.constraint(form),
                )
            )
        return job
