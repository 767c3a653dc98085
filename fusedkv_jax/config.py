"""The configuration of a decoder: frozen dataclasses, validated when they are built."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fusedkv_jax import layouts
from fusedkv_jax.geometry import Geometry
from fusedkv_jax.layouts import KVLayout
from fusedkv_jax.validation import build, validate

FloatType = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "dots", "qkv"]
RopeScaling = Literal["none", "linear", "llama3", "yarn"]
Norm = Literal["rms", "rms_plus_one", "layer"]
NormPlacement = Literal["pre", "post", "both"]
NormSpan = Literal["head", "all"]
Activation = Literal["silu", "gelu", "gelu_tanh"]


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the field, the value and the fix."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, half-split (NeoX) convention.

    Attributes:
        theta: base of the frequencies.
        scaling: `none`, `linear` (positions divided by `factor`), `llama3` (Llama 3.1), or `yarn`
            (arXiv 2309.00071).
        factor: context extension factor.
        original_length: context length in tokens before extension.
        low_freq_factor: llama3, below which wavelengths are fully scaled.
        high_freq_factor: llama3, above which wavelengths are kept.
        beta_fast: yarn, rotations above which a channel is kept.
        beta_slow: yarn, rotations below which a channel is fully scaled.
        mscale: yarn, multiplies cos and sin by 0.1 * mscale * ln(factor) + 1 (over the same with
            `mscale_all_dim`, where that is not 0).
        mscale_all_dim: yarn as in DeepSeek; MLA multiplies its score scale by its squared term.
        fraction: share of each head's channels that rotate, the first ones (GPT-NeoX, Phi).
    """

    theta: float = 10_000.0
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    fraction: float = 1.0

    def __post_init__(self) -> None:
        positive = ("theta", "factor", "high_freq_factor", "beta_slow", "fraction")
        least = {"original_length": 1}
        validate(self, ConfigError, least=least, above=dict.fromkeys(positive, 0))
        ordered = {
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("beta_slow", "beta_fast"),
        }
        if self.scaling in ordered:
            low, high = ordered[self.scaling]
            if not getattr(self, low) < getattr(self, high):
                raise ConfigError(
                    f"{high}={getattr(self, high)}; use more than {low}={getattr(self, low)}"
                )
        if self.scaling == "yarn" and self.theta <= 1:
            raise ConfigError(f"theta={self.theta}; yarn needs more than 1")
        if self.fraction > 1:
            raise ConfigError(f"fraction={self.fraction}; use more than 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
        kv_lora_rank: width d_c of the cached latent.
        nope_dim: channels per head without rotation.
        rope_dim: width d_r of the rotary key that all heads share.
        v_dim: value channels per head.
        q_lora_rank: width of the query latent; 0 projects queries directly.
    """

    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    q_lora_rank: int = 0

    def __post_init__(self) -> None:
        least = dict.fromkeys(("kv_lora_rank", "nope_dim", "rope_dim", "v_dim"), 1)
        validate(self, ConfigError, least=least | {"q_lora_rank": 0})
        if self.rope_dim % 2:
            raise ConfigError(f"rope_dim={self.rope_dim} is odd; rotary channels come in pairs")


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """How a layer is built around its attention; the defaults are Llama's.

    Attributes:
        norm: of hidden states, queries and keys: `rms`, `rms_plus_one` (the stored scale is added
            to one; Gemma), or `layer` (with mean and bias; GPT-NeoX).
        norm_placement: a branch's norm is before it (`pre`), after it (`post`; OLMo 2), or both
            (Gemma 2 and 3).
        qk_norm_over: the norm of queries and keys is over the channels of each `head`, or of `all`
            heads together (OLMo 2).
        qkv_bias: the projections of queries, keys and values have biases (Qwen2).
        output_bias: so has attention's output projection.
        mlp_bias: so have the feed-forward's.
        activation: of the feed-forward.
        gated: the feed-forward multiplies by a gate (SwiGLU, GeGLU).
        parallel: attention and feed-forward read the same input (GPT-NeoX).
        residual_scale: multiplies what a branch adds (Granite).
        attention_scale: multiplies the scores; default 1 / sqrt(head_dim).
        attention_softcap: scores s become cap * tanh(s / cap) (Gemma 2).
    """

    norm: Norm = "rms"
    norm_placement: NormPlacement = "pre"
    qk_norm_over: NormSpan = "head"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    gated: bool = True
    parallel: bool = False
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None

    def __post_init__(self) -> None:
        scales = ("residual_scale", "attention_scale", "attention_softcap")
        validate(self, ConfigError, above=dict.fromkeys(scales, 0))
        if self.parallel and self.norm_placement != "pre":
            raise ConfigError(
                f"norm_placement={self.norm_placement!r} with parallel=True; use 'pre'"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder language model.

    Attributes:
        vocab_size: number of token ids.
        num_layers: number of layers.
        d_model: model width D.
        num_heads: query heads N.
        num_kv_heads: key/value heads K, dividing N; default N (MHA). 1 is MQA. Not used with `mla`.
        head_dim: channels per head H; default d_model / num_heads.
        d_ff: width of the feed-forward.
        layout: a name with options (`fusedkv`, `cla:k=3`), the layer-types grammar, or a
            `KVLayout`; afterwards always a `KVLayout`.
        max_length: context length in tokens that the model is meant for.
        qk_norm: RMSNorm over the channels of each query and key head before rotation (Qwen3).
        tie_embeddings: the output head is the transposed embedding.
        norm_eps: epsilon of every norm.
        block: biases, norms, activation and scales of the layers.
        embedding_scale: multiplies what enters the first layer.
        logit_scale: multiplies the logits.
        logit_softcap: logits x become cap * tanh(x / cap) (Gemma 2).
        rope: rotary embedding.
        window_rope: that of layers with a window, where it differs (Gemma 3).
        nope_layers: layers without rotary embedding (SmolLM3).
        mla: multi-head latent attention instead of separate keys and values.
        init_std: standard deviation of the normal initializer of matrices.
        dtype: of activations.
        param_dtype: of parameters (fusion weights are always float32).
        remat: what the backward pass recomputes: `none`, `full` (each layer), `dots` (all but
            matrix products and attention), `qkv` (all but queries, keys and values).
        scan_layers: run equal layers with `lax.scan`, so that depth does not grow the program.
        attention: implementation, see `pallas_kernels.implementations()`.

    Raises:
        ConfigError: a field is out of range or fields contradict each other.
        LayoutError: the layout is unknown or makes no sense.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    layout: KVLayout | str = "mha"
    max_length: int = 8192
    qk_norm: bool = True
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    block: BlockConfig = BlockConfig()
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    rope: RopeConfig = RopeConfig()
    window_rope: RopeConfig | None = None
    nope_layers: tuple[int, ...] = ()
    mla: MLAConfig | None = None
    init_std: float = 0.02
    dtype: FloatType = "float32"
    param_dtype: FloatType = "float32"
    remat: Remat = "none"
    scan_layers: bool = True
    attention: str = "auto"

    def __post_init__(self) -> None:
        above = dict.fromkeys(_ABOVE, 0)
        validate(self, ConfigError, least=dict.fromkeys(_COUNTS, 1), above=above)
        self._resolve_heads()
        if isinstance(self.layout, str):
            object.__setattr__(self, "layout", layouts.resolve(self.layout, self.num_layers))
        if self.kv_layout.num_layers != self.num_layers:
            raise ConfigError(
                f"layout has {self.kv_layout.num_layers} layers but num_layers={self.num_layers};"
                " pass the layout by name, or use config.replace(num_layers=...)"
            )
        if self.mla is not None:
            _check_mla_layout(self.kv_layout)
            _check_mla_block(self)
        _check_ropes(self)
        if self.attention != "auto":
            _check_attention(self.attention)

    def _resolve_heads(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            if self.d_model % self.num_heads:
                raise ConfigError(
                    f"num_heads={self.num_heads} does not divide d_model={self.d_model};"
                    " change one of them or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads};"
                f" use a divisor of {self.num_heads}"
            )
        if self.mla is None and self.channels % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd; rotary channels come in pairs")

    @property
    def kv_layout(self) -> KVLayout:
        """`layout`, typed as what it is after construction."""
        assert isinstance(self.layout, KVLayout)
        return self.layout

    @property
    def kv_heads(self) -> int:
        """K, after its default."""
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def channels(self) -> int:
        """H, after its default."""
        assert self.head_dim is not None
        return self.head_dim

    @functools.cached_property
    def geometry(self) -> Geometry:
        """The sizes of attention's heads.

        With MLA the key stream is the shared rotary key and the value stream the latent. One query
        attends to these themselves (its up-projections are absorbed), many to expanded ones.
        """
        if self.mla is None:
            stream, channels = (self.kv_heads, self.channels), (self.channels, self.channels)
            return Geometry(self.num_heads, stream, stream, self.channels, channels, channels)
        mla = self.mla
        return Geometry(
            heads=self.num_heads,
            keys=(1, mla.rope_dim),
            values=(1, mla.kv_lora_rank),
            rotary=mla.rope_dim,
            products=(mla.nope_dim + mla.rope_dim, mla.v_dim),
            single_products=(mla.kv_lora_rank + mla.rope_dim, mla.kv_lora_rank),
        )

    @functools.cached_property
    def layer_ropes(self) -> tuple[RopeConfig | None, ...]:
        """The rotary embedding of each layer; None where there is none."""
        windowed = self.window_rope or self.rope
        return tuple(
            None if i in self.nope_layers else windowed if layer.window else self.rope
            for i, layer in enumerate(self.kv_layout.layers)
        )

    @functools.cached_property
    def rope_kinds(self) -> tuple[RopeConfig | None, ...]:
        """The different ones among them."""
        return tuple(dict.fromkeys(self.layer_ropes))

    @property
    def stream_shapes(self) -> dict[layouts.Kind, tuple[int, int]]:
        """(heads, channels) of one token's cached `key` and `value` stream."""
        return self.geometry.stream_shapes

    def replace(self, **changes: object) -> ModelConfig:
        """A copy with other fields; a named layout follows a changed `num_layers`."""
        if "num_layers" in changes and "layout" not in changes and self.kv_layout.spec:
            changes["layout"] = self.kv_layout.spec
        if {"d_model", "num_heads"} & set(changes) and "head_dim" not in changes:
            if self.channels * self.num_heads == self.d_model:
                changes["head_dim"] = None
        if "num_heads" in changes and "num_kv_heads" not in changes:
            if self.kv_heads == self.num_heads:
                changes["num_kv_heads"] = None
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; `from_dict` inverts it."""
        fields = dataclasses.asdict(self)
        if layouts.has_name(self.kv_layout):
            fields["layout"] = self.kv_layout.spec
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> ModelConfig:
        """Build a configuration from plain values.

        Raises:
            ConfigError: a field is unknown (the nearest names are suggested), missing or wrong.
        """
        if not isinstance(fields, Mapping):
            raise ConfigError(f"model={fields!r}; use fields by name")
        fields = dict(fields)
        for name, kind in _PARTS.items():
            if isinstance(part := fields.get(name), Mapping):
                fields[name] = build(kind, part, ConfigError, f"{name}.")
        if isinstance(layers := fields.get("nope_layers"), list):  # as JSON has it
            fields["nope_layers"] = tuple(layers)
        if isinstance(layout := fields.get("layout"), Mapping):
            fields["layout"] = KVLayout.from_dict(layout)
        return build(cls, fields, ConfigError)


_COUNTS: tuple[str, ...] = (
    "vocab_size",
    "num_layers",
    "d_model",
    "num_heads",
    "d_ff",
    "num_kv_heads",
    "head_dim",
    "max_length",
)
_ABOVE: tuple[str, ...] = (
    "norm_eps",
    "init_std",
    "embedding_scale",
    "logit_scale",
    "logit_softcap",
)


_PARTS = {"block": BlockConfig, "rope": RopeConfig, "window_rope": RopeConfig, "mla": MLAConfig}


def _check_mla_block(config: ModelConfig) -> None:
    plain = BlockConfig()
    for name in ("qkv_bias", "output_bias", "qk_norm_over", "attention_scale", "attention_softcap"):
        if getattr(config.block, name) != getattr(plain, name):
            raise ConfigError(
                f"block.{name}={getattr(config.block, name)!r}; MLA has no such option"
            )
    if config.rope.fraction != 1 or config.window_rope or config.nope_layers:
        raise ConfigError(
            "MLA has one rotary embedding of all its rotary channels; set mla.rope_dim"
        )


def _check_ropes(config: ModelConfig) -> None:
    wrong = [i for i in config.nope_layers if not 0 <= i < config.num_layers]
    if wrong:
        raise ConfigError(
            f"nope_layers has {wrong[0]}; the layers are 0 to {config.num_layers - 1}"
        )
    fractions = {rope.fraction for rope in config.rope_kinds if rope is not None}
    if len(fractions) > 1 or (fractions | {1.0}) != {1.0} and None in config.rope_kinds:
        raise ConfigError("rope.fraction differs between layers; use one value")
    for rope in config.rope_kinds if config.mla is None else ():
        if rope is not None and config.channels * rope.fraction % 2:
            raise ConfigError(f"rope.fraction={rope.fraction} gives an odd number of channels")
    for i, layer in enumerate(config.kv_layout.layers):
        for j in layer.key.sources:
            if config.layer_ropes[i] != config.layer_ropes[j]:
                raise ConfigError(
                    f"layer {i} reads the keys of layer {j}, which rotate in another way; share"
                    " keys only between layers of one rotary embedding"
                )
        if layer.key.weights not in (None, "scalar", "head") and fractions - {1.0}:
            raise ConfigError(
                f"layer {i} weights key channels in rotary pairs, and rope.fraction is not 1;"
                " use weights of scalars or heads"
            )


def _check_attention(name: str) -> None:
    from pallas_kernels import choice  # loads JAX, without which most configurations are made

    try:
        choice.check_name(name)
    except ValueError as error:
        raise ConfigError(f"attention={name!r}: {error}") from None


def _check_mla_layout(layout: KVLayout) -> None:
    for i, layer in enumerate(layout.layers):
        if (layer.key.own, layer.key.sources) != (layer.value.own, layer.value.sources):
            raise ConfigError(
                f"layer {i} reads keys and values from different layers, but MLA holds both in one"
                " latent; choose a layout that shares them together, such as fusedkv or yoco"
            )
