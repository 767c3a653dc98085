"""Llama in PyTorch whose layers share keys and values as `lckv-llama` checkpoints say.

Written from the papers (arXiv 2410.14442, YOCO++, arXiv 2512.03870), with the tensors by their
names there: one token at a time, so that a layer that reads one above it sees earlier tokens only.
"""

import torch

EPS = 1e-5
THETA = 10_000.0


def draw(fields, seed=0):
    """A checkpoint's tensors, large enough for every part to matter."""
    generator = torch.Generator().manual_seed(seed)
    width, hidden, vocab = (fields[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    size = width // heads
    targets, method = _targets(fields), fields.get("method", "yoco")
    tensors = {}

    def matrix(name, rows, columns):
        tensors[name] = torch.randn(rows, columns, generator=generator) * columns**-0.5

    def vector(name, length, mean=1.0):
        tensors[name] = mean + 0.3 * torch.randn(length, generator=generator)

    tensors["model.embed_tokens.weight"] = torch.randn(vocab, width, generator=generator)
    matrix("lm_head.weight", vocab, width)
    vector("model.norm.weight", width)
    for i in range(fields["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        vector(layer + "input_layernorm.weight", width)
        vector(layer + "post_attention_layernorm.weight", width)
        matrix(layer + "self_attn.q_proj.weight", width, width)
        matrix(layer + "self_attn.o_proj.weight", width, width)
        for name in ("gate", "up"):
            matrix(layer + f"mlp.{name}_proj.weight", hidden, width)
        matrix(layer + "mlp.down_proj.weight", width, hidden)
        names = ("key_weight", "value_weight", "key_weight0", "value_weight0")
        if i in targets:
            for name in ("k", "v"):
                matrix(layer + f"self_attn.{name}_proj.weight", kv_heads * size, width)
            if method == "yoco-plus" and i:
                for name in names[:2]:
                    vector(layer + "self_attn." + name, 2, 0.02)
        elif method == "fusedkv":
            for name in names:
                vector(layer + "self_attn." + name, size // 2)
    return tensors


def logits(fields, tensors, tokens):
    """[T, V] of one sequence, token by token."""
    states = [{} for _ in range(fields["num_hidden_layers"])]  # of each layer, by position
    rows = [_token(fields, tensors, states, t, int(token)) for t, token in enumerate(tokens)]
    return torch.stack(rows)


def _targets(fields):
    return [int(part.rstrip("s")) for part in fields["layer_types"].split("_")]


def _norm(x, scale):
    return x * torch.rsqrt((x * x).mean() + EPS) * scale


def _rotated(x, position):
    half = x.shape[-1] // 2
    angle = position * THETA ** (-2 * torch.arange(half) / x.shape[-1])
    a, b = x[:, :half], x[:, half:]
    turned = (
        a * torch.cos(angle) - b * torch.sin(angle),
        b * torch.cos(angle) + a * torch.sin(angle),
    )
    return torch.cat(turned, -1)


def _token(fields, tensors, states, t, token):
    x = tensors["model.embed_tokens.weight"][token]
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    size, targets = fields["hidden_size"] // heads, _targets(fields)
    for i, target in enumerate(targets):
        of = lambda name, i=i: tensors[f"model.layers.{i}.{name}"]  # noqa: E731
        normed = _norm(x, of("input_layernorm.weight"))
        q = _rotated((of("self_attn.q_proj.weight") @ normed).reshape(heads, size), t)
        if i in targets:
            k, v = (
                (of(f"self_attn.{name}_proj.weight") @ normed).reshape(kv_heads, size)
                for name in ("k", "v")
            )
            k = _rotated(k, t)
            if fields.get("method") == "yoco-plus" and i:
                scale = fields["scaling_factor"]
                first = states[0][t]
                (a, b), (c, d) = (of(f"self_attn.{name}_weight") for name in ("key", "value"))
                k, v = scale * (a * first[0] + b * k), scale * (c * first[1] + d * v)
            states[i][t] = k, v
        window = (
            fields["sliding_window"] if fields["layer_types"].split("_")[i][-1] == "s" else t + 1
        )
        places = [s for s in range(max(0, t + 1 - window), t + 1) if s in states[target]]
        if places:
            read = [_read(fields, of, states, i, target, s) for s in places]
            keys, values = (
                torch.stack(part, 1).repeat_interleave(heads // kv_heads, 0)
                for part in zip(*read, strict=True)
            )
            scores = torch.softmax((keys @ q[..., None])[..., 0] * size**-0.5, -1)
            out = (scores[:, None] @ values)[:, 0].reshape(-1)
            x = x + of("self_attn.o_proj.weight") @ out
        normed = _norm(x, of("post_attention_layernorm.weight"))
        gate, up = (of(f"mlp.{name}_proj.weight") @ normed for name in ("gate", "up"))
        x = x + of("mlp.down_proj.weight") @ (torch.nn.functional.silu(gate) * up)
    return tensors["lm_head.weight"] @ _norm(x, tensors["model.norm.weight"])


def _read(fields, of, states, i, target, s):
    """Keys and values [K, H] of one position as a layer reads them."""
    k, v = states[target][s]
    method = fields.get("method", "yoco")
    if i in _targets(fields) or method in ("yoco", "yoco-plus"):
        return k, v
    first = states[0][s]
    if method == "fusedkv-lite":
        return k, first[1]
    # One weight stands for a channel and the one half a head further, in values too.
    twice = lambda name: of(f"self_attn.{name}").repeat(2)  # noqa: E731
    return (
        twice("key_weight") * k + twice("key_weight0") * first[0],
        twice("value_weight") * v + twice("value_weight0") * first[1],
    )
