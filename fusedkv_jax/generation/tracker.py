"""One output while it is generated: its tokens, its text, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence

from fusedkv_jax.generation.logprobs import Logprobs
from fusedkv_jax.generation.requests import Codec, LogitsError, PreparedRequest, logits_error
from fusedkv_jax.generation.results import FinishReason, Output, PlaceLogprobs
from fusedkv_jax.generation.sampling import NO_TOKEN
from fusedkv_jax.generation.text import Detokenizer, StopTexts


class Tracker:
    """Takes an output's tokens as they come.

    Args:
        request: what the output belongs to.
        index: its number among the request's outputs.
        codec: decodes it.
        piecewise: text is wanted with every `push`, not only at the end.
    """

    def __init__(self, request: PreparedRequest, index: int, codec: Codec, piecewise: bool):
        self.request, self.index = request, index
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: LogitsError | None = None
        self._tokens: list[int] = []
        self._logprobs: list[PlaceLogprobs] | None = None
        self._texts: list[str] = []
        params = request.params
        self._decode = codec.decoder(params.skip_special_tokens)
        self._detokenizer = None if self._decode is None else Detokenizer(self._decode)
        self._stops = StopTexts(params.stop, params.include_stop_str_in_output)
        self._piecewise = piecewise or bool(params.stop)
        if params.logprobs is not None:
            self._logprobs = []

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def push(
        self,
        tokens: Sequence[int],
        logprobs: Logprobs | None,
        ended: bool,
        complete: bool = False,
    ) -> tuple[str | None, tuple[int, ...], list[PlaceLogprobs] | None]:
        """Take new tokens; `error` is set where none could be chosen.

        Args:
            tokens: those after the ones taken before.
            logprobs: the row's arrays, at the places of these tokens.
            ended: the batch has ended this row with them.
            complete: and nothing may follow them, as if a stop token had come.

        Returns:
            New text, and the tokens and log-probabilities that belong to the output: nothing after
            the token that completes a stop text.
        """
        if tokens[-1] == NO_TOKEN:
            place = len(self._tokens) + len(tokens)
            self.error = logits_error(self.request.number, f"at output token {place}")
            return None, (), None
        stopped = ended and tokens[-1] in self.request.stops
        text, kept = self._take(tokens, stopped, complete)
        self._tokens.extend(tokens[:kept])
        if self.finish_reason is None and ended:
            self.finish_reason = "stop" if stopped or complete else "length"
            if stopped and tokens[-1] != self.request.eos_id:
                self.stop_reason = tokens[-1]
        new = None
        if self._logprobs is not None and logprobs is not None:
            wanted = self.request.params.logprobs
            new = logprobs.dictionaries(tokens[:kept], wanted, self._decode)
            self._logprobs += new
        if text is not None:
            self._texts.append(text)
        return text, tuple(tokens[:kept]), new

    def output(self) -> Output:
        """The whole output, once it has ended."""
        assert self.finish_reason is not None
        text = None if self._decode is None else "".join(self._texts)
        total = None
        if self._logprobs is not None:
            pairs = zip(self._tokens, self._logprobs, strict=True)
            total = sum(place[token].logprob for token, place in pairs)
        return Output(
            self.index,
            text,
            tuple(self._tokens),
            self.finish_reason,
            self.stop_reason,
            total,
            self._logprobs,
        )

    def _take(self, tokens: Sequence[int], stopped: bool, complete: bool) -> tuple[str | None, int]:
        """New text, and how many of the tokens the output keeps."""
        if self._detokenizer is None or self._decode is None:
            return None, len(tokens)
        params = self.request.params
        hidden = stopped and not params.include_stop_str_in_output
        shown = tokens[: len(tokens) - hidden]
        last = stopped or complete or self._fills(tokens)
        if not self._piecewise:  # all tokens come at once
            return self._decode(shown), len(tokens)
        if not params.stop:
            text = self._detokenizer.push(shown)
            if last:
                text += self._detokenizer.flush()
            return text, len(tokens)
        return self._search(tokens, shown, last)

    def _search(self, tokens: Sequence[int], shown: Sequence[int], last: bool) -> tuple[str, int]:
        """Token by token, so that the output ends with the one that completes a stop text."""
        assert self._detokenizer is not None
        text, unarmed = "", self.request.params.min_tokens - len(self._tokens)
        for place, token in enumerate(shown):
            text += self._stops.push(self._detokenizer.push([token]), place >= unarmed)
            if self._stops.found is not None:
                return self._stop_text(text, place + 1)
        if last:
            text += self._stops.push(self._detokenizer.flush(), len(tokens) > unarmed)
            if self._stops.found is not None:
                return self._stop_text(text, len(tokens))
            text += self._stops.flush()
        return text, len(tokens)

    def _stop_text(self, text: str, kept: int) -> tuple[str, int]:
        self.finish_reason, self.stop_reason = "stop", self._stops.found
        return text, kept

    def _fills(self, tokens: Sequence[int]) -> bool:
        """Whether the output has all tokens that it may have with these."""
        total = len(self.request.prompt) + len(self._tokens) + len(tokens)
        return total >= self.request.limit
