"""What `generate` and `stream` give back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]  # the last two: while serving


@dataclass(frozen=True)
class Logprob:
    """A token that could have come.

    Attributes:
        logprob: natural logarithm of its probability.
        rank: 1 for the likeliest token.
        decoded_token: its text, if there is a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


PlaceLogprobs = dict[int, Logprob]


@dataclass(frozen=True)
class Output:
    """One continuation of a prompt.

    Attributes:
        index: its number among the prompt's outputs; beams are in order of their score.
        text: the decoded output up to the stop token or stop text, if there is a tokenizer.
        token_ids: the output; a stop token, or the token that completes a stop text, is its last.
        finish_reason: `stop` (a stop token or stop text) or `length`.
        stop_reason: the stop text, or the id of the stop token unless it is the end-of-text token.
        cumulative_logprob: sum of the tokens' log-probabilities, where they were asked for.
        logprobs: for each token, the log-probabilities of it and of the likeliest tokens.
    """

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[PlaceLogprobs] | None = None


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with; the attributes of its first output are its own too.

    Attributes:
        prompt_token_ids: the prompt.
        outputs: as many as were asked for; none if there is an error.
        prompt_logprobs: for each token of the prompt but the first (None), the log-probabilities of
            it and of the likeliest tokens, if asked for.
        error: why the request was refused, with `on_error="return"`.
    """

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Output, ...]
    prompt_logprobs: list[PlaceLogprobs | None] | None = None
    error: str | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def text(self) -> str | None:
        return self.outputs[0].text

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self.outputs[0].stop_reason

    @property
    def logprobs(self) -> list[PlaceLogprobs] | None:
        return self.outputs[0].logprobs


@dataclass(frozen=True)
class Delta:
    """What one output has grown by. All deltas of an output, joined, are the output.

    Attributes:
        prompt: number of the prompt.
        index: number of the output among the prompt's.
        text: new text: whole characters, never a part of a stop text; may be empty. None without a
            tokenizer.
        token_ids: new tokens.
        logprobs: theirs, if asked for.
        finish_reason: None until the last delta of the output.
        stop_reason: as in `Output`.
    """

    prompt: int
    index: int
    text: str | None
    token_ids: tuple[int, ...]
    logprobs: list[PlaceLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass
class Rates:
    """How many tokens have been processed, and in what time.

    Attributes:
        prompt_tokens: of prefilled prompts; a shared prefix counts for each prompt.
        prefill_seconds: until the first tokens were there, without compiling.
        output_tokens: generated, the first of each output included.
        decode_seconds: for all tokens after the first, without compiling.
        compile_seconds: spent on compiling in between, or on reading compiled programs.
        requests: prompts that have been completed.
        first_tokens: outputs that have begun; their first tokens belong to prefill.
        drafted, accepted: tokens that speculation drafted, and those of them that were right.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    output_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    requests: int = 0
    first_tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    def __str__(self) -> str:
        prefill = self.prompt_tokens / max(self.prefill_seconds, 1e-9)
        decode = (self.output_tokens - self.first_tokens) / max(self.decode_seconds, 1e-9)
        drafts = ""
        if self.drafted:
            drafts = f"; {self.accepted} of {self.drafted} drafted tokens accepted"
        compiling = ""
        if self.compile_seconds >= 0.05:
            compiling = f"; {self.compile_seconds:.1f} s compiling beside"
        return (
            f"prefill {self.prompt_tokens} tokens, {prefill:.0f} tokens/s; "
            f"decode {self.output_tokens} tokens, {decode:.1f} tokens/s{drafts}{compiling}"
        )
