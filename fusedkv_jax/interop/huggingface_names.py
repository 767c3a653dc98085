"""Which Hugging Face tensor is which of our parameters, and how its axes and channels move.

The names are Llama's; `fused_tensors` gives them to families that name or cut tensors otherwise.

Hugging Face stores a linear layer as [out, in] with the heads flattened into one axis, one layer a
tensor; we store [in, ...] or [..., out] with heads and channels apart, and stack equal layers on a
first axis. Everything else about the two formats is the table below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import runs
from fusedkv_jax.model.mixing import chains

# Where our axes stand: a vector or table as it is; their vector's [*out]; [in, *out]; [*in, out].
Axes = Literal["same", "flat", "in_first", "out_last"]


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        theirs: name of the tensor, within `model.layers.<i>.` for a layer's.
        ours: path of the parameter, within its block for a layer's.
        axes: how the axes of ours follow from theirs.
        rotary: its last channels are rotated, so their order depends on the rotary convention.
    """

    theirs: str
    ours: tuple[str, ...]
    axes: Axes
    rotary: bool = False


WHOLE = (
    Entry("model.embed_tokens.weight", ("embedding",), "same"),
    Entry("model.norm.weight", ("final_norm", "scale"), "same"),
    Entry("model.norm.bias", ("final_norm", "bias"), "same"),
    Entry("lm_head.weight", ("head",), "in_first"),
)

# Which of a layer's norms is which, by where they stand.
_NORMS = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
}

_EVERY_LAYER = (
    Entry("mlp.gate_proj.weight", ("mlp", "gate"), "in_first"),
    Entry("mlp.up_proj.weight", ("mlp", "up"), "in_first"),
    Entry("mlp.down_proj.weight", ("mlp", "down"), "in_first"),
    Entry("mlp.gate_proj.bias", ("mlp", "gate_bias"), "same"),
    Entry("mlp.up_proj.bias", ("mlp", "up_bias"), "same"),
    Entry("mlp.down_proj.bias", ("mlp", "down_bias"), "same"),
    Entry("self_attn.o_proj.weight", ("attention", "o_proj"), "out_last"),
    Entry("self_attn.o_proj.bias", ("attention", "o_bias"), "same"),
)

# Separate keys and values.
HEADS = (
    *_EVERY_LAYER,
    Entry("self_attn.q_proj.weight", ("attention", "q_proj"), "in_first", rotary=True),
    Entry("self_attn.k_proj.weight", ("attention", "k_proj"), "in_first", rotary=True),
    Entry("self_attn.v_proj.weight", ("attention", "v_proj"), "in_first"),
    Entry("self_attn.q_proj.bias", ("attention", "q_bias"), "flat", rotary=True),
    Entry("self_attn.k_proj.bias", ("attention", "k_bias"), "flat", rotary=True),
    Entry("self_attn.v_proj.bias", ("attention", "v_bias"), "flat"),
    Entry("self_attn.q_norm.weight", ("attention", "q_norm", "scale"), "same", rotary=True),
    Entry("self_attn.k_norm.weight", ("attention", "k_norm", "scale"), "same", rotary=True),
    Entry("self_attn.q_norm.bias", ("attention", "q_norm", "bias"), "same", rotary=True),
    Entry("self_attn.k_norm.bias", ("attention", "k_norm", "bias"), "same", rotary=True),
)

# DeepSeek-V2 and V3, their dense layers.
_LATENT = (
    *_EVERY_LAYER,
    Entry("self_attn.q_a_proj.weight", ("attention", "q_a_proj"), "in_first"),
    Entry("self_attn.q_a_layernorm.weight", ("attention", "q_a_norm", "scale"), "same"),
    Entry(
        "self_attn.kv_a_proj_with_mqa.weight",
        ("attention", "kv_a_proj"),
        "in_first",
        rotary=True,
    ),
    Entry("self_attn.kv_a_layernorm.weight", ("attention", "kv_a_norm", "scale"), "same"),
    Entry("self_attn.kv_b_proj.weight", ("attention", "kv_b_proj"), "in_first"),
)


def places(
    config: ModelConfig, path: tuple[Any, ...], own: bool = False
) -> list[tuple[int | None, str, Entry]]:
    """(index on the stacked axis or None, their name, table entry) for one of our parameters.

    Args:
        config: of the model.
        path: of the parameter.
        own: in our own format (`own_format`), which has more names than the families.
    """
    if path[0] == "mixing":
        kind, _, layers = chains(config.kv_layout)[path[2]]
        entry = Entry(f"self_attn.{kind}_weights", tuple(map(str, path)), "same")
    elif path[0] == "runs":
        entry = layer_entries(config, own)[path[3:]]
        layers = runs(config.kv_layout)[path[1]].layers(path[2])
    else:
        entry = next(entry for entry in WHOLE if entry.ours == path)
        return [(None, entry.theirs, entry)]
    return [(j, f"model.layers.{i}.{entry.theirs}", entry) for j, i in enumerate(layers)]


def layer_entries(config: ModelConfig, own: bool = False) -> dict[tuple[str, ...], Entry]:
    """The table of one layer's parameters, by our path."""
    norms = dict(_NORMS[config.block.norm_placement])
    # YOCO's norm of its shared cache starts as the norm that those keys and values had.
    norms["kv_norm"] = "kv_layernorm" if own else norms["attention_norm"]
    entries = [
        Entry(f"{theirs}.{kind}", (ours, part), "same")
        for ours, theirs in norms.items()
        for kind, part in (("weight", "scale"), ("bias", "bias"))
    ]
    if config.mla is None:
        return {entry.ours: entry for entry in (*entries, *HEADS)}
    queries = "q_b_proj" if config.mla.q_lora_rank else "q_proj"
    query = Entry(f"self_attn.{queries}.weight", ("attention", "q_proj"), "in_first", rotary=True)
    return {entry.ours: entry for entry in (*entries, *_LATENT, query)}


def their_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the Hugging Face tensor of one layer, from the shape of ours."""
    if entry.axes == "same":
        return shape
    if entry.axes == "flat":
        return (math.prod(shape),)
    if entry.axes == "in_first":
        return (math.prod(shape[1:]), shape[0])
    return (shape[-1], math.prod(shape[:-1]))


def to_ours(
    entry: Entry, array: np.ndarray, shape: tuple[int, ...], interleaved: int = 0
) -> np.ndarray:
    """One layer's parameter from its Hugging Face tensor.

    Args:
        entry: its line of the table.
        array: the tensor, of `their_shape`.
        shape: shape of our parameter.
        interleaved: number of last channels that hold rotary pairs as (2c, 2c + 1), as DeepSeek
            stores them; they move to (c, c + half). 0 if pairs are halves already.
    """
    array = array if entry.axes == "same" else array.T.reshape(shape)  # a vector's T is itself
    if not (interleaved and entry.rotary):
        return array
    plain, pairs = np.split(array, [array.shape[-1] - interleaved], axis=-1)
    return np.concatenate([plain, pairs[..., 0::2], pairs[..., 1::2]], axis=-1)


def to_theirs(entry: Entry, array: np.ndarray) -> np.ndarray:
    """One layer's Hugging Face tensor, contiguous, from our parameter."""
    if entry.axes == "flat":
        array = array.reshape(-1)
    elif entry.axes != "same":
        flat = (array.shape[0], -1) if entry.axes == "in_first" else (-1, array.shape[-1])
        array = array.reshape(flat).T
    return np.ascontiguousarray(array)
