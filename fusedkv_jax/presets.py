"""Named configurations: the sizes of the FusedKV paper, a demo size, and public geometries.

The public ones are geometries, without weights; layouts other than `mha` are what such a model
would be with that layout.
"""

from __future__ import annotations

from fusedkv_jax.config import ConfigError, MLAConfig, ModelConfig, RopeConfig
from fusedkv_jax.layouts import KVLayout
from fusedkv_jax.validation import check_type, nearest_or_all


def _paper(num_layers: int, d_model: int, num_heads: int, d_ff: int) -> dict[str, object]:
    """arXiv 2512.03870: Qwen3-style blocks, 128,000 untied tokens, context 8192, MHA."""
    return dict(
        vocab_size=128_000,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        d_ff=d_ff,
        max_length=8192,
    )


def _qwen3(
    num_layers: int, d_model: int, num_heads: int, d_ff: int, *, tied: bool
) -> dict[str, object]:
    """Qwen3 (arXiv 2505.09388): 8 KV heads of 128 channels, norms on queries and keys."""
    return dict(
        vocab_size=151_936,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        d_ff=d_ff,
        max_length=40_960,
        tie_embeddings=tied,
        rope=RopeConfig(theta=1_000_000.0),
    )


def _llama(num_layers: int, d_model: int, num_heads: int, d_ff: int) -> dict[str, object]:
    """Llama blocks: no norms on queries and keys, epsilon 1e-5; sizes of Llama 2."""
    return dict(
        vocab_size=32_000,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        d_ff=d_ff,
        max_length=4096,
        qk_norm=False,
        norm_eps=1e-5,
        rope=RopeConfig(),
    )


def _llama3(factor: float, *, tied: bool) -> dict[str, object]:
    """What Llama 3 has otherwise: grouped heads, more tokens, and a context that is stretched."""
    return dict(
        vocab_size=128_256,
        num_kv_heads=8,
        max_length=131_072,
        tie_embeddings=tied,
        rope=RopeConfig(theta=500_000.0, scaling="llama3", factor=factor, original_length=8192),
    )


_PRESETS: dict[str, dict[str, object]] = {
    # Bytes and two special tokens (`fusedkv_jax.data`), for a few minutes on two CPU cores.
    "demo": dict(vocab_size=258, num_layers=8, d_model=192, num_heads=6, d_ff=512, max_length=512),
    "332m": _paper(12, 1024, 16, 4096),
    "650m": _paper(16, 1536, 16, 4096),
    "1_5b": _paper(24, 2048, 16, 5632),
    "4b": _paper(36, 2560, 32, 9728),
    # The paper's 650M model with multi-head latent attention.
    "650m_mla": _paper(16, 1536, 16, 4096)
    | dict(
        qk_norm=False,
        mla=MLAConfig(kv_lora_rank=736, nope_dim=64, rope_dim=32, v_dim=96, q_lora_rank=864),
    ),
    "qwen3_0_6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3_1_7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3_4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3_8b": _qwen3(36, 4096, 32, 12_288, tied=False),
    "qwen3_14b": _qwen3(40, 5120, 40, 17_408, tied=False),
    "qwen3_32b": _qwen3(64, 5120, 64, 25_600, tied=False),
    "llama2_7b": _llama(32, 4096, 32, 11_008) | dict(num_kv_heads=32),
    "llama3_1_8b": _llama(32, 4096, 32, 14_336) | _llama3(8.0, tied=False),
    "llama3_2_1b": _llama(16, 2048, 32, 8192) | _llama3(32.0, tied=True),
    "llama3_2_3b": _llama(28, 3072, 24, 8192) | _llama3(32.0, tied=True),
    "tinyllama_1_1b": _llama(22, 2048, 32, 5632) | dict(num_kv_heads=4, max_length=2048),
    # DeepSeek-V2 (arXiv 2405.04434), its dense first layer's feed-forward in every layer.
    "deepseek_v2_dense": dict(
        vocab_size=102_400,
        num_layers=60,
        d_model=5120,
        num_heads=128,
        d_ff=12_288,
        max_length=163_840,
        qk_norm=False,
        rope=RopeConfig(
            scaling="yarn",
            factor=40.0,
            original_length=4096,
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
        mla=MLAConfig(kv_lora_rank=512, nope_dim=128, rope_dim=64, v_dim=128, q_lora_rank=1536),
    ),
}


def names() -> tuple[str, ...]:
    """The presets."""
    return tuple(_PRESETS)


def get(name: str, layout: str | KVLayout = "fusedkv", **overrides: object) -> ModelConfig:
    """Build a preset's configuration.

    Args:
        name: one of `names()`.
        layout: as in `ModelConfig`.
        **overrides: fields of `ModelConfig` to change; `rope` and `mla` also as mappings.

    Raises:
        ConfigError: unknown preset or field (the nearest are suggested), or a refused value.
        LayoutError: the layout is unknown or does not fit.
    """
    check_type("name", name, str, ConfigError)
    if name not in _PRESETS:
        raise ConfigError(f"unknown preset {name!r}{nearest_or_all(name, _PRESETS)}")
    return ModelConfig.from_dict({**_PRESETS[name], "layout": layout, **overrides})
