"""A decoder whose layers read the keys and values of other layers: fusedkv_jax's, in PyTorch.

This file needs torch and transformers, and nothing else: copy it wherever you like. In the folder
of an exported model it serves

    transformers.AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

and without trusting a folder's code, next to your own,

    FusedKVForCausalLM.from_pretrained(FOLDER)

It is written to be read and compared. Whole sequences are computed, in plain PyTorch; no cache is
kept, so generation computes the sequence again for each token.

What config.json says, beside the fields of every model of transformers:

- `fusedkv`: the model's configuration in fusedkv_jax. Its `layout.layers` has, for each layer, a
  `key` and a `value` stream: `own` (the layer projects it), `sources` (layers whose stream is read)
  and `weights` (the granularity of learned weights, or null). A stream with an own projection is
  what a decoder would cache; one without is rebuilt from the cached streams of its sources.
- `derived`: what follows from it. `rotary` has the tables of rotary embeddings (inverse
  frequencies of the pairs of channels c and c + half, and a factor of cosine and sine),
  `layer_rotary` the table of each layer (null for none), `softmax_scale` the factor of the scores,
  and `cyclic_groups` the ranges of layers that are computed several times, since some of them read
  one above.
"""

import json
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

Fields = dict[str, Any]  # a part of config.json
Angles = tuple[Tensor, Tensor]  # cosines and sines [B, T, pairs]
Streams = dict[tuple[str, int], Tensor]  # or their weights, by kind and layer
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# Names of the norms of the attention and the feed-forward branch, by where they stand.
NORMS_BEFORE = {"pre": ("input_layernorm", "post_attention_layernorm")}
NORMS_BEFORE["both"] = ("input_layernorm", "pre_feedforward_layernorm")
NORMS_AFTER = dict.fromkeys(
    ("post", "both"), ("post_attention_layernorm", "post_feedforward_layernorm")
)


class FusedKVConfig(PretrainedConfig):
    model_type = "fusedkv"

    def __init__(
        self,
        fusedkv: Fields | None = None,
        derived: Fields | None = None,
        **kwargs: Any,
    ) -> None:
        self.fusedkv = fusedkv or {}
        self.derived = derived or {}
        super().__init__(**(kwargs | {"use_cache": False}))


class FusedKVNorm(nn.Module):
    """RMS norm (`rms_plus_one` adds one to the scale), or layer norm, in float32."""

    def __init__(self, cfg: Fields, size: int) -> None:
        super().__init__()
        self.kind, self.eps = cfg["block"]["norm"], cfg["norm_eps"]
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if self.kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        wide, weight = x.float(), self.weight.float()
        if self.bias is not None:
            return F.layer_norm(wide, weight.shape, weight, self.bias.float(), self.eps).to(x.dtype)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (weight + (self.kind == "rms_plus_one"))).to(x.dtype)


def rotate(x: Tensor, angles: Angles | None) -> Tensor:
    """Turn the first channels of heads [B, T, heads, H] by cosines and sines [B, T, pairs]."""
    if angles is None:
        return x
    cos, sin = (part[:, :, None, :] for part in angles)
    turning = 2 * cos.shape[-1]
    a, b = x[..., :turning].float().chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, x[..., turning:]], dim=-1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, visible: Tensor
) -> Tensor:
    """Attention of queries [B, T, N, H] over keys and values [B, S, K, H]; no key gives zero."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("btnh,bsnh->bnts", q.float(), k.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1))
    return torch.einsum("bnts,bsnh->btnh", weights, v.float()).to(q.dtype)


class FusedKVStreamWeights(nn.Module):
    """Where a layer's learned stream weights are: `key_weights` and `value_weights`."""

    def __init__(self, cfg: Fields, layer: Fields) -> None:
        super().__init__()
        mla = cfg["mla"]
        plain = (cfg["num_kv_heads"], cfg["head_dim"])
        self.shapes = {
            "key": (1, mla["rope_dim"]) if mla else plain,
            "value": (1, mla["kv_lora_rank"]) if mla else plain,
        }
        for kind in ("key", "value"):
            stream = layer[kind]
            if stream["weights"] is None:
                continue
            heads, channels = self.shapes[kind]
            channels = channels // 2 if kind == "key" else channels  # one weight a rotary pair
            size = {
                "scalar": (),
                "head": (heads,),
                "channel": (heads, channels),
                "shared_channel": (channels,),
            }[stream["weights"]]
            convex = stream["mixing"]["parameterization"] == "convex"
            terms = 1 if convex else len(stream["sources"]) + stream["own"]
            weights = nn.Parameter(torch.ones(terms, *size, dtype=torch.float32))
            self.register_parameter(f"{kind}_weights", weights)

    def expand(self, kind: str, stream: Fields, weights: Tensor) -> Tensor:
        """Weights [J, ...] as [J, heads, channels]."""
        if kind == "key" and stream["weights"] in ("channel", "shared_channel"):
            weights = torch.cat([weights, weights], dim=-1)
        if stream["weights"] == "shared_channel":
            weights = weights[:, None, :]
        while weights.ndim < 3:
            weights = weights[..., None]
        return weights.expand(weights.shape[0], *self.shapes[kind])


class FusedKVAttention(FusedKVStreamWeights):
    """Separate keys and values (MHA, GQA, MQA)."""

    def __init__(self, cfg: Fields, layer: Fields) -> None:
        super().__init__(cfg, layer)
        self.block, self.channels = cfg["block"], cfg["head_dim"]
        width, heads, kv_heads = cfg["d_model"], cfg["num_heads"], cfg["num_kv_heads"]
        biased, over_all = self.block["qkv_bias"], self.block["qk_norm_over"] == "all"

        def projection(count: int) -> nn.Linear:
            return nn.Linear(width, count * self.channels, bias=biased)

        def norm(count: int) -> FusedKVNorm | None:
            return (
                FusedKVNorm(cfg, self.channels * (count if over_all else 1))
                if cfg["qk_norm"]
                else None
            )

        output_bias = self.block["output_bias"]
        self.q_proj, self.q_norm = projection(heads), norm(heads)
        self.o_proj = nn.Linear(heads * self.channels, width, bias=output_bias)
        if layer["key"]["own"]:
            self.k_proj, self.k_norm = projection(kv_heads), norm(kv_heads)
        if layer["value"]["own"]:
            self.v_proj = projection(kv_heads)

    def heads(
        self, x: Tensor, projection: nn.Linear, norm: FusedKVNorm | None, angles: Angles | None
    ) -> Tensor:
        x = projection(x)
        if norm is not None:
            x = norm(x.unflatten(-1, (-1, norm.weight.shape[0]))).flatten(-2)
        return rotate(x.unflatten(-1, (-1, self.channels)), angles)

    def queries(self, x: Tensor, angles: Angles | None) -> Tensor:
        return self.heads(x, self.q_proj, self.q_norm, angles)

    def own_streams(self, x: Tensor, angles: Angles | None) -> dict[str, Tensor]:
        found = {}
        if hasattr(self, "k_proj"):
            found["key"] = self.heads(x, self.k_proj, self.k_norm, angles)
        if hasattr(self, "v_proj"):
            found["value"] = self.heads(x, self.v_proj, None, None)
        return found

    def forward(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor
    ) -> Tensor:
        out = attend(q, keys, values, scale, self.block["attention_softcap"], visible)
        return self.o_proj(out.flatten(-2))


class FusedKVLatentAttention(FusedKVStreamWeights):
    """Multi-head latent attention: keys are the rotary key, values the latent."""

    def __init__(self, cfg: Fields, layer: Fields) -> None:
        super().__init__(cfg, layer)
        self.mla, width, heads = cfg["mla"], cfg["d_model"], cfg["num_heads"]
        nope, rope, v = (self.mla[name] for name in ("nope_dim", "rope_dim", "v_dim"))
        latent, low = self.mla["kv_lora_rank"], self.mla["q_lora_rank"]
        if low:
            self.q_a_proj = nn.Linear(width, low, bias=False)
            self.q_a_layernorm = FusedKVNorm(cfg, low)
            self.q_b_proj = nn.Linear(low, heads * (nope + rope), bias=False)
        else:
            self.q_proj = nn.Linear(width, heads * (nope + rope), bias=False)
        self.kv_b_proj = nn.Linear(latent, heads * (nope + v), bias=False)
        self.o_proj = nn.Linear(heads * v, width, bias=False)
        if layer["key"]["own"] or layer["value"]["own"]:
            self.kv_a_proj_with_mqa = nn.Linear(width, latent + rope, bias=False)
            self.kv_a_layernorm = FusedKVNorm(cfg, latent)

    def queries(self, x: Tensor, angles: Angles | None) -> Tensor:
        low = self.mla["q_lora_rank"]
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if low else self.q_proj(x)
        q = q.unflatten(-1, (-1, self.mla["nope_dim"] + self.mla["rope_dim"]))
        still, turning = q.split([self.mla["nope_dim"], self.mla["rope_dim"]], dim=-1)
        return torch.cat([still, rotate(turning, angles)], dim=-1)

    def own_streams(self, x: Tensor, angles: Angles | None) -> dict[str, Tensor]:
        if not hasattr(self, "kv_a_proj_with_mqa"):
            return {}
        both = self.kv_a_proj_with_mqa(x)[:, :, None, :]
        latent, key = both.split([self.mla["kv_lora_rank"], self.mla["rope_dim"]], dim=-1)
        return {"key": rotate(key, angles), "value": self.kv_a_layernorm(latent)}

    def forward(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor
    ) -> Tensor:
        both = self.kv_b_proj(values[:, :, 0])
        both = both.unflatten(-1, (-1, self.mla["nope_dim"] + self.mla["v_dim"]))
        still, v = both.split([self.mla["nope_dim"], self.mla["v_dim"]], dim=-1)
        k = torch.cat([still, keys.expand(-1, -1, still.shape[2], -1)], dim=-1)
        return self.o_proj(attend(q, k, v, scale, None, visible).flatten(-2))


class FusedKVMLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x)))."""

    def __init__(self, cfg: Fields) -> None:
        super().__init__()
        block, width, hidden = cfg["block"], cfg["d_model"], cfg["d_ff"]
        self.activation, biased = ACTIVATIONS[block["activation"]], block["mlp_bias"]
        self.gate_proj = nn.Linear(width, hidden, bias=biased) if block["gated"] else None
        self.up_proj = nn.Linear(width, hidden, bias=biased)
        self.down_proj = nn.Linear(hidden, width, bias=biased)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        if self.gate_proj is None:
            return self.down_proj(self.activation(up))
        return self.down_proj(self.activation(self.gate_proj(x)) * up)


class FusedKVDecoderLayer(nn.Module):
    """One layer; `streams` holds what the layers have put so far, by kind and layer."""

    def __init__(self, cfg: Fields, number: int) -> None:
        super().__init__()
        self.number, self.block = number, cfg["block"]
        self.kv = cfg["layout"]["layers"][number]
        self.self_attn = (FusedKVLatentAttention if cfg["mla"] else FusedKVAttention)(cfg, self.kv)
        self.mlp = FusedKVMLP(cfg)
        placement = self.block["norm_placement"]
        self.before, self.after = NORMS_BEFORE.get(placement), NORMS_AFTER.get(placement)
        for name in (self.before or ()) + (self.after or ()):
            setattr(self, name, FusedKVNorm(cfg, cfg["d_model"]))
        if self.kv["kv_norm"]:
            self.kv_layernorm = FusedKVNorm(cfg, cfg["d_model"])

    def enter(self, branch: int, x: Tensor) -> Tensor:
        return x if self.before is None else getattr(self, self.before[branch])(x)

    def leave(self, branch: int, out: Tensor) -> Tensor:
        out = out if self.after is None else getattr(self, self.after[branch])(out)
        return out * self.block["residual_scale"]

    def forward(
        self,
        x: Tensor,
        streams: Streams,
        weights: Streams,
        angles: Angles | None,
        scale: float,
        columns: Tensor,
    ) -> Tensor:
        normed = self.enter(0, x)
        q = self.self_attn.queries(normed, angles)
        source = self.kv_layernorm(x) if self.kv["kv_norm"] else normed
        for kind, own in self.self_attn.own_streams(source, angles).items():
            stream = self.kv[kind]
            if stream["weights"] is not None:  # a residual, mixed before it is stored
                terms = [streams[kind, j] for j in stream["sources"]]
                own = self.mix(kind, [*terms, own], weights)
            streams[kind, self.number] = own
        keys, values = (self.read(kind, streams, weights) for kind in ("key", "value"))
        out = self.leave(0, self.self_attn(q, keys, values, scale, self.visible(columns)))
        if self.block["parallel"]:
            return x + out + self.leave(1, self.mlp(self.enter(1, x)))
        x = x + out
        return x + self.leave(1, self.mlp(self.enter(1, x)))

    def read(self, kind: str, streams: Streams, weights: Streams) -> Tensor:
        """What attention sees: the own stream, another layer's, or a weighted sum of several."""
        stream = self.kv[kind]
        if stream["own"] and (not stream["sources"] or stream["weights"] is not None):
            return streams[kind, self.number]
        sources = [streams[kind, j] for j in stream["sources"]]
        return sources[0] if stream["weights"] is None else self.mix(kind, sources, weights)

    def mix(self, kind: str, terms: list[Tensor], weights: Streams) -> Tensor:
        pairs = zip(weights[kind, self.number], terms, strict=True)
        return sum(w * term.float() for w, term in pairs).to(terms[0].dtype)

    def visible(self, present: Tensor) -> Tensor:
        """Which tokens [B, T, S] a query sees; `present` [B, S] says which are not padding.

        A layer that reads one above it does not see the token itself, which is not there yet.
        """
        strict = any(j > self.number for kind in ("key", "value") for j in self.kv[kind]["sources"])
        place = torch.arange(present.shape[1], device=present.device)
        back = place[:, None] - place[None, :]
        seen = back >= int(strict)
        if self.kv["window"] is not None:
            seen = seen & (back < self.kv["window"])
        return seen[None] & present[:, None, :]


class FusedKVModel(nn.Module):
    """Embedding, layers and the final norm."""

    def __init__(self, config: FusedKVConfig) -> None:
        super().__init__()
        self.cfg, self.derived = config.fusedkv, config.derived
        cfg = self.cfg
        self.embed_tokens = nn.Embedding(cfg["vocab_size"], cfg["d_model"])
        self.layers = nn.ModuleList([FusedKVDecoderLayer(cfg, i) for i in range(cfg["num_layers"])])
        self.norm = FusedKVNorm(cfg, cfg["d_model"])

    def forward(self, input_ids: Tensor, present: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        x = x * torch.tensor(self.cfg["embedding_scale"], dtype=x.dtype)
        angles = [self.angles(table, position_ids) for table in self.derived["rotary"]]
        weights, streams, first = self.stream_weights(), {}, 0

        def run(layers: Iterable[int], x: Tensor) -> Tensor:
            for i in layers:
                table = self.derived["layer_rotary"][i]
                turn = None if table is None else angles[table]
                scale = self.derived["softmax_scale"]
                x = self.layers[i](x, streams, weights, turn, scale, present)
            return x

        for start, stop in self.derived["cyclic_groups"]:
            x = run(range(first, start), x)
            # Several passes from the same input; the first one reads zeros above.
            for kind, shape in self.layers[start].self_attn.shapes.items():
                zeros = x.new_zeros(*x.shape[:2], *shape)
                streams.update({(kind, i): zeros for i in range(start, stop)})
            for _ in range(sum(self.cfg["layout"]["passes"]) - 1):
                run(range(start, stop), x)
            x, first = run(range(start, stop), x), stop
        x = run(range(first, len(self.layers)), x)
        normed = self.norm(x)
        return normed * self.cfg["logit_scale"]

    def angles(self, table: Fields, positions: Tensor) -> Angles:
        frequencies = torch.tensor(table["inverse_frequencies"], device=positions.device)
        angles = positions[..., None].float() * frequencies.float()
        return angles.cos() * table["scale"], angles.sin() * table["scale"]

    def stream_weights(self) -> Streams:
        """Learned weights [J, heads, channels] of each weighted stream, by kind and layer."""
        chains = {}
        for i, layer in enumerate(self.cfg["layout"]["layers"]):
            for kind in ("key", "value"):
                if layer[kind]["weights"] is not None:
                    name = kind, json.dumps(layer[kind], sort_keys=True)
                    chains.setdefault(name, []).append(i)
        found = {}
        for (kind, _), layers in chains.items():
            stream = self.cfg["layout"]["layers"][layers[0]][kind]
            modules = [self.layers[i].self_attn for i in layers]
            stored = torch.stack([getattr(m, f"{kind}_weights").float() for m in modules])
            direct = direct_weights(stream["mixing"], stored)
            for i, module, row in zip(layers, modules, direct, strict=True):
                found[kind, i] = module.expand(kind, stream, row)
        return found


def direct_weights(mixing: Fields, stored: Tensor) -> Tensor:
    """Weights of the layers of a chain [C, J, ...] from what is stored of them."""
    if mixing["parameterization"] == "convex":
        stored = torch.cat([1 - stored, stored], dim=1)
    anchor = mixing["anchor"] % stored.shape[1]
    others = [j for j in range(stored.shape[1]) if j != anchor]
    if mixing["parameterization"] == "iterative" and others:
        rows = [stored[0]]  # FusedKV's recursion over depth (arXiv 2512.03870)
        for row in stored[1:]:
            terms = list(row * rows[-1])
            terms[anchor] = row[others[0]] * rows[-1][anchor] + row[anchor]
            rows.append(torch.stack(terms))
        stored = torch.stack(rows)
    return mixing["scale"] * stored


class FusedKVForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its output head, which is the embedding where they are tied."""

    config_class = FusedKVConfig
    base_model_prefix = "model"
    _tied_weights_keys = None
    _keep_in_fp32_modules_strict = ("key_weights", "value_weights")  # however it is loaded

    def __init__(self, config: FusedKVConfig) -> None:
        super().__init__(config)
        cfg = config.fusedkv
        self.model = FusedKVModel(config)
        tied = cfg["tie_embeddings"]
        self.lm_head = None if tied else nn.Linear(cfg["d_model"], cfg["vocab_size"], bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing is drawn: this file is for models that exist."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Tensor | None]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits [B, T, V] in float32; `attention_mask` [B, T] is 0 for padding, on either side."""
        present = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        present = present.bool()
        if position_ids is None:
            position_ids = (present.long().cumsum(-1) - 1).clamp(min=0)
        x = self.model(input_ids, present, position_ids)
        if isinstance(logits_to_keep, int) and logits_to_keep:
            x = x[:, -logits_to_keep:]
        head = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits, cap = F.linear(x, head).float(), self.config.fusedkv["logit_softcap"]
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
