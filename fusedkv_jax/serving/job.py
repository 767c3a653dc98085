"""What a caller has asked for, and what has come of it: a prompt with its n outputs."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.generation.requests import Codec, PromptError, make_requests
from fusedkv_jax.generation.requests import Request as Prompt
from fusedkv_jax.generation.sampling import NO_TOKEN
from fusedkv_jax.generation.tracker import Tracker
from fusedkv_jax.serving.draws import Draw, check_lists
from fusedkv_jax.serving.output import Delta
from fusedkv_jax.serving.request import Request, RequestError
from fusedkv_jax.serving.runner import Drawn


@dataclass(eq=False)
class Output:
    """One of a job's outputs: its text so far, and the request that the scheduler knows."""

    tracker: Tracker
    params: SamplingParams
    request: Request

    def draw(self) -> Draw:
        """How its next token is drawn."""
        return Draw(self.request, self.tracker.request, self.params)

    def take(self, drawn: Drawn) -> Delta:
        """Its next token; `tracker.finished` tells whether it is the last."""
        prompt, tracker = self.tracker.request, self.tracker
        if drawn.token == NO_TOKEN:
            tracker.push([drawn.token], None, True)
            return Delta(tracker.index, finish_reason="error", error=str(tracker.error))
        known = self.request.length + 1
        ended = drawn.token in prompt.stops or known >= prompt.limit
        text, tokens, logprobs = tracker.push([drawn.token], drawn.logprobs, ended)
        return Delta(
            tracker.index,
            tokens,
            text or "",
            None if logprobs is None else tuple(logprobs),
            tracker.finish_reason,
            tracker.stop_reason,
        )


@dataclass(eq=False)
class Job:
    """A prompt with n outputs, of which the first alone runs until the prompt is computed.

    Attributes:
        name: what the caller calls it.
        prompt: its tokens and parameters, checked.
        outputs: all n.
        cached: tokens of the prompt that were found in the prefix cache.
    """

    name: str
    prompt: Prompt
    outputs: list[Output] = field(default_factory=list)
    cached: int = 0

    @classmethod
    def of(
        cls, name: str, prompt: Prompt, codec: Codec, *, arrival: float, priority: int, tenant: str
    ) -> Job:
        """The job of a checked prompt.

        Args:
            name: what the caller calls it.
            prompt: the prompt.
            codec: decodes its outputs.
            arrival: seconds.
            priority: lower is more urgent.
            tenant: whose it is; tenants share no pages.
        """
        job, params = cls(name, prompt), prompt.params
        seed = secrets.randbits(32) if params.seed is None else params.seed
        for index in range(params.n):
            own = dataclasses.replace(params, seed=(seed + index) % 2**32)
            request = Request(
                name if params.n == 1 else f"{name}/{index}",
                np.asarray(prompt.prompt, np.int32),
                prompt.limit - len(prompt.prompt),
                arrival=arrival,
                client=tenant,
                priority=priority,
                salt=tenant,
            )
            tracker = Tracker(prompt, index, codec, piecewise=True)
            job.outputs.append(Output(tracker, own, request))
        return job

    @property
    def live(self) -> list[Output]:
        """Outputs that have not ended."""
        return [output for output in self.outputs if not output.tracker.finished]

    def told(self, delta: Delta) -> Delta:
        """A delta with what is the same for all of the job's."""
        prompt = len(self.prompt.prompt)
        return dataclasses.replace(delta, prompt_tokens=prompt, cached_tokens=self.cached)


def check_prompt(
    config: ModelConfig,
    name: str,
    prompt: str | Sequence[int],
    params: SamplingParams,
    codec: Codec,
    max_model_len: int,
    max_logprobs: int,
) -> Prompt:
    """A prompt that can be served.

    Raises:
        RequestError: it cannot; the message says why, and names the limit.
    """
    try:
        (checked,), _ = make_requests(config, [prompt], params, codec)
    except PromptError as error:
        raise RequestError(name, error.reason) from None
    if params.prompt_logprobs is not None:
        raise RequestError(
            name, "has prompt_logprobs, which the engine does not serve; use fkv.generate"
        )
    wanted = params.logprobs
    if wanted is not None and not 0 <= wanted <= max_logprobs:
        raise RequestError(name, f"has logprobs={wanted}; use 0 to max_logprobs={max_logprobs}")
    size = len(checked.prompt) + (params.max_tokens or 1)
    if size > max_model_len:
        raise RequestError(
            name,
            f"can come to {size} tokens, prompt {len(checked.prompt)} and max_tokens together;"
            f" max_model_len={max_model_len} is the limit",
        )
    try:
        check_lists(checked)
    except ValueError as error:
        raise RequestError(name, f"is refused: {error}") from None
    return dataclasses.replace(checked, limit=min(checked.limit, max_model_len))
