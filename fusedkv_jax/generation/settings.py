"""How a model is run: the settings of `generate` and its kin, checked where they are given."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypedDict, TypeVar, runtime_checkable

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from fusedkv_jax.cache import KVCache
from fusedkv_jax.compression.compressor import Compressor
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation.loop import DecodeState
from fusedkv_jax.generation.params import BeamSearchParams, SamplingParams
from fusedkv_jax.generation.parts import Parts
from fusedkv_jax.generation.sampling import SamplerInputs, bucket
from fusedkv_jax.model import Decoder
from fusedkv_jax.validation import check_kind, nearest_or_all

P = ParamSpec("P")
R = TypeVar("R")


@runtime_checkable
class Speculation(Protocol):
    """What replaces the decode loop and keeps its outputs, such as `SelfSpeculation`."""

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where a model cannot use it."""
        ...

    def decode(
        self,
        graph: nnx.GraphDef[Decoder],
        params: PyTree,
        state: DecodeState,
        inputs: SamplerInputs,
        steps: Int[Array, ""] | int | None = None,
    ) -> DecodeState: ...


class Settings(TypedDict, total=False):
    """The fields of `EngineSettings`, as keyword arguments of `generate` and its kin."""

    eos_id: int | None
    add_special_tokens: bool
    batch_size: int
    cache_dtype: str | None
    bucketing: bool
    max_num_batched_tokens: int | None
    enable_prefix_caching: bool
    compression: Compressor | None
    speculation: Speculation | None
    mesh: Mesh | None
    prefill_parts: Parts | None


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How a model is run.

    Attributes:
        eos_id: end-of-text token where there is no tokenizer, or instead of its own.
        add_special_tokens: texts begin with the tokenizer's BOS token, as documents do in training.
        batch_size: outputs decoded together at most (more where one prompt wants more).
        cache_dtype: storage type of the cache, by default the model's activation type.
        bucketing: round batch, prompt and cache lengths up to powers of two, so that new lengths
            rarely compile. Outputs do not depend on it, but for PyramidKV's: its budgets follow
            the padded length of a batch's prompts.
        max_num_batched_tokens: tokens that one step of prefill processes at most, over all
            prompts of a batch; longer prompts are prefilled in chunks. Default no bound.
        enable_prefix_caching: prefill what all prompts begin with (16 tokens or more) once.
        compression: a compressor of `fusedkv_jax.compression`; it shrinks the cache that
            prompts leave.
        speculation: a speculative decoder; it replaces the loop and keeps its outputs.
        mesh: devices to run on, as `fusedkv_jax.sharding.make_mesh` gives them; by default the
            mesh that is set (`jax.set_mesh`), or one device. Rows are split over `data` and
            `fsdp`, heads over `tensor`.
        prefill_parts: prefill in parts, one for each place of the mesh's `context` axis:
            `equal`, `balanced`, or their relative sizes (`fusedkv_jax.generation.parts`).

    Raises:
        ValueError: a value of the wrong kind or out of bounds.
    """

    eos_id: int | None = None
    add_special_tokens: bool = True
    batch_size: int = 32
    cache_dtype: str | None = None
    bucketing: bool = True
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    compression: Compressor | None = None
    speculation: Speculation | None = None
    mesh: Mesh | None = None
    prefill_parts: Parts | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_num_batched_tokens"):
            if name == "batch_size" or getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        if self.eos_id is not None:
            check_whole("eos_id", self.eos_id, 0)
        for name in ("add_special_tokens", "bucketing", "enable_prefix_caching"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}; use True or False")
        if not isinstance(self.cache_dtype, str | None):
            raise ValueError(f"cache_dtype={self.cache_dtype!r}; use a name, such as 'int8'")
        compressor, drafts, mesh = self.compression, self.speculation, self.mesh
        _check_kind("compression", compressor, Compressor, _COMPRESSION)
        _check_kind("speculation", drafts, Speculation, "SelfSpeculation(draft_tokens=4)")
        remedy = "make_mesh(MeshConfig(tensor=4)) of fusedkv_jax.sharding"
        _check_kind("mesh", mesh, Mesh, remedy)
        if drafts is not None and compressor is not None and not compressor.rewinds:
            raise ValueError(
                f"speculation cannot take back what a rejected token changes in the cache of"
                f" {compressor.title}; leave one of them out, or compress with SnapKV, PyramidKV,"
                " PyramidInfer or StreamingLLM"
            )
        parts = self.prefill_parts
        if isinstance(parts, str) and parts not in ("equal", "balanced"):
            raise ValueError(f"prefill_parts={parts!r}; use equal, balanced, or sizes")
        if self.prefill_parts is not None:
            for name in ("max_num_batched_tokens", "compression"):
                if getattr(self, name) is not None:
                    raise ValueError(f"prefill_parts and {name} exclude each other; give one")

    @property
    def _least_chunk(self) -> int:
        """Tokens of a row that have to run at once, as a size of arrays."""
        least = 1 if self.compression is None else self.compression.least_chunk or 1
        return bucket(least, 1) if self.bucketing else least

    @property
    def most_rows(self) -> int:
        """Rows of a batch, so few that `max_num_batched_tokens` is enough for each."""
        if self.max_num_batched_tokens is None:
            return self.batch_size
        rows = self.max_num_batched_tokens // self._least_chunk
        if self.bucketing:  # arrays have that many rows, rounded up
            rows = 1 << (rows.bit_length() - 1)
        return min(self.batch_size, rows)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where a model cannot be run in this way."""
        if self.eos_id is not None:
            check_whole("eos_id", self.eos_id, 0, config.vocab_size - 1)
        compressor, budget = self.compression, self.max_num_batched_tokens
        if compressor is not None and budget is not None:
            bound = f"max_num_batched_tokens={budget} cannot bound {type(compressor).__name__}"
            if compressor.least_chunk is None:
                raise ValueError(
                    f"{bound}, which runs whole prompts; leave it out, or use another compressor"
                )
            if budget < self._least_chunk:
                raise ValueError(
                    f"{bound}, which runs {self._least_chunk} tokens at once; use as many"
                )
        for extension in (self.speculation, self.compression):
            if extension is not None:
                extension.check(config)
        if self.cache_dtype is not None:
            create = functools.partial(KVCache.create, config, dtype=self.cache_dtype)
            jax.eval_shape(lambda: create(batch_size=1, max_length=config.max_length))


_COMPRESSION = "a compressor, such as fusedkv_jax.compression.SnapKV(budget=1024)"


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raises ValueError unless a setting is a whole number within the bounds."""
    whole = int(value) if isinstance(value, numbers.Integral) else None
    bounded = math.inf if most is None else most
    if whole is None or isinstance(value, bool) or not least <= whole <= bounded:
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}={value!r}; use {bounds}")


def _check_kind(name: str, value: object, kind: type, remedy: str) -> None:
    # A class has the methods of its instances, so a protocol alone would take it.
    if value is None or (isinstance(value, kind) and not isinstance(value, type)):
        return
    raise ValueError(f"{name}={value!r}; pass {remedy}, or None")


def check_model(model: object) -> None:
    """Raises ValueError unless it is a model."""
    check_kind(
        "model",
        model,
        Decoder,
        "a Decoder, such as the one of fusedkv_jax.training.load_model(workdir)",
    )


def takes_settings(function: Callable[P, R]) -> Callable[P, R]:
    """Shows the settings in a function's signature, and refuses what is none with the remedy."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default)
        for f in dataclasses.fields(EngineSettings)
        if f.name not in signature.parameters
    ]
    known = [p.name for p in (*own, *shared)]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise TypeError(f"{function.__name__}: {_unknown(name, kwargs[name], known)}")
        return function(*args, **kwargs)

    # Annotations are strings in this package, and those of settings stand in `EngineSettings`.
    checked.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
    return checked


def _unknown(name: str, value: object, known: list[str]) -> str:
    for kind in (SamplingParams, BeamSearchParams):
        if name in (field.name for field in dataclasses.fields(kind)):
            return (
                f"{name} is a sampling parameter; pass it as"
                f" params={kind.__name__}({name}={value!r})"
            )
    return f"unknown argument {name!r}{nearest_or_all(name, known)}"
