"""What runs a model: its programs, the sizes of their arrays, and how texts become tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation.buckets import Buckets
from fusedkv_jax.generation.parts import part_ends
from fusedkv_jax.generation.programs import GenerationPrograms
from fusedkv_jax.generation.requests import Codec, PreparedRequest, PromptError, TokenizerLike
from fusedkv_jax.generation.results import Rates
from fusedkv_jax.generation.settings import EngineSettings
from fusedkv_jax.model import Decoder, check_parts


@dataclass(frozen=True)
class OfflineEngine:
    """A model and how it is run.

    Attributes:
        model: the model.
        tokenizer: encodes prompts and decodes outputs, or None.
        settings: how it is run.
        rates: what has been processed so far.
    """

    model: Decoder
    tokenizer: TokenizerLike | None = None
    settings: EngineSettings = EngineSettings()
    rates: Rates = field(default_factory=Rates)

    def __post_init__(self) -> None:
        self.settings.check(self.model.config)
        self._check_parts(self.programs.placement.workers)  # and the mesh

    def _check_parts(self, workers: int) -> None:
        parts = self.settings.prefill_parts
        if parts is None:
            return
        if workers == 1:
            raise ValueError(
                f"prefill_parts={parts!r} needs a mesh whose context axis takes the"
                " parts, such as mesh=make_mesh(MeshConfig(context=4))"
            )
        part_ends(workers, workers, parts)  # refuses what is no cut
        check_parts(self.config, self.programs.cache_shapes(workers, self.config.max_length))

    @functools.cached_property
    def programs(self) -> GenerationPrograms:
        """Its compiled programs."""
        return GenerationPrograms.of(self.model, self.settings)

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model that runs, its fusion folded."""
        return self.programs.model.config

    @functools.cached_property
    def buckets(self) -> Buckets:
        """Sizes of arrays."""
        return Buckets(self.settings, self.programs.placement)

    @functools.cached_property
    def codec(self) -> Codec:
        """How texts become tokens and tokens text."""
        settings = self.settings
        return Codec(self.tokenizer, settings.eos_id, settings.add_special_tokens)


def group(
    requests: Sequence[PreparedRequest], settings: EngineSettings
) -> list[list[PreparedRequest]]:
    """Requests that run together.

    Neighbors in length do, which saves padding; those that want log-probabilities of their prompts
    are apart, since their prefill runs all layers.

    Raises:
        PromptError: log-probabilities of a prompt are wanted beside a compressor.
    """
    if settings.compression is not None:
        for request in requests:
            if request.params.prompt_logprobs is not None:
                reason = f"has prompt_logprobs, which {settings.compression.title} does not give"
                raise PromptError(f"{reason}; leave one of the two out", request.number)
    rows = settings.most_rows
    found: list[list[PreparedRequest]] = []
    for scored in (False, True):
        own = [r for r in requests if (r.params.prompt_logprobs is not None) == scored]
        size = rows  # a new batch for the first
        for request in sorted(own, key=lambda r: len(r.prompt)):
            if size + request.params.n > rows:
                found.append([])
                size = 0
            found[-1].append(request)
            size += request.params.n
    return found
