"""Compressed decoding against a NumPy decoder that simulates every method token by token."""

import functools
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.compression import H2O, CompressionError, PyramidKV, SnapKV, StreamingLLM
from tests.oracles.compressed_decoder import Policy, logits
from tests.oracles.decoder import THETA, Row, build, draw, rotated, small_config

PROMPTS, LATER = np.array([14, 9], np.int32), 7
WIDTH = 14  # columns of the prompt array
TOKENS = np.random.default_rng(1).integers(0, 37, (2, WIDTH + LATER))
GROUP, KV_HEADS = 2, 2


def own(i):
    return Row([(i, 1.0)], [(i, 1.0)])


@functools.cache
def models(layout):
    """(decoder, drawn parameters, rows, sets): the sets of layers that read streams together."""
    config = small_config(layout, qk_norm=True)
    drawn = draw(config)
    if layout == "mha":
        rows, fusion, sets = [own(i) for i in range(6)], [], [{i} for i in range(6)]
    else:
        rng = np.random.default_rng(2)
        half, values = (rng.normal(size=(3, 2, 2, size)).astype(np.float32) for size in (4, 8))
        keys = np.concatenate([half, half], axis=-1)
        upper = [Row(*[[(0, w[c, 0]), (2, w[c, 1])] for w in (keys, values)]) for c in range(3)]
        rows, fusion = [own(i) for i in range(3)] + upper, [half, values]
        sets = [{0, 2, 3, 4, 5}, {1}]
    return build(config, drawn, fusion), drawn, rows, sets


@dataclass
class Streaming(Policy):
    sinks: int = 0
    window: int = 0
    reindex: bool = True
    windows: dict = field(default_factory=dict)  # of layers that have one
    thetas: dict = field(default_factory=dict)  # of layers with another than usual, or none (None)

    def seen(self, layer, head, token):
        if layer in self.windows:
            return list(range(max(0, token - self.windows[layer] + 1), token + 1))
        recent = range(max(0, token - self.window + 1), token + 1)
        return sorted({*range(min(self.sinks, token + 1)), *recent})

    def place(self, token, seen):
        if not self.reindex:
            return super().place(token, seen)
        return len(seen) - 1, {position: index for index, position in enumerate(seen)}

    def turned(self, layer, heads, place):
        theta = self.thetas.get(layer, THETA)
        return heads if theta is None else rotated(heads, place, theta)


@dataclass
class Observed(Policy):
    """SnapKV and PyramidKV: sets of tokens are chosen after the prompt, then only grow."""

    prompt: int = 0
    sets: list = field(default_factory=list)
    budgets: list = field(default_factory=list)
    window: int = 0
    kernel: int = 1
    kept: dict = field(default_factory=dict)  # (layer, KV head) -> positions of the prompt

    def seen(self, layer, head, token):
        if token < self.prompt:
            return super().seen(layer, head, token)
        return [*self.kept[layer, head], *range(self.prompt, token + 1)]

    def step(self, token):
        if token != self.prompt - 1:
            return
        for layers, budget in zip(self.sets, self.budgets, strict=True):
            for head in range(KV_HEADS):
                found = self._choice(layers, head, budget)
                self.kept.update({(layer, head): found for layer in layers})

    def _choice(self, layers, head, budget):
        if self.prompt <= budget:
            return list(range(self.prompt))
        older = self.prompt - self.window
        total = np.zeros(older)
        for layer in layers:
            for n in range(head * GROUP, (head + 1) * GROUP):
                mass = np.zeros(older)
                for t in range(older, self.prompt):
                    for s in range(older):
                        mass[s] += self.probabilities[layer, t, n][s]
                side = self.kernel // 2
                pooled = [mass[max(0, s - side) : s + side + 1].max() for s in range(older)]
                total += np.array(pooled) / GROUP / len(layers)
        best = np.argsort(-total, kind="stable")[: budget - self.window]
        return sorted([*best.tolist(), *range(older, self.prompt)])


@dataclass
class Heavy(Policy):
    """H2O, tokens held by set and KV head with the mass that they have received."""

    prompt: int = 0
    sets: list = field(default_factory=list)
    budget: int = 0
    recent: int = 0
    decode_scores: bool = True
    held: dict = field(default_factory=dict)  # (set, KV head) -> {position: mass}
    evicted: int = 0

    def _key(self, layer, head):
        return next(i for i, layers in enumerate(self.sets) if layer in layers), head

    def seen(self, layer, head, token):
        held = self.held.setdefault(self._key(layer, head), {})
        held.setdefault(token, 0.0)
        return list(held)

    def watch(self, layer, token, n, found):
        if token >= self.prompt and not self.decode_scores:
            return
        held = self.held[self._key(layer, n // GROUP)]
        for position, p in found.items():
            held[position] += p / GROUP

    def step(self, token):
        if token < self.prompt - 1:
            return
        for key, held in self.held.items():
            if token == self.prompt - 1 and len(held) > self.budget:
                older = sorted(p for p in held if p < self.prompt - self.recent)
                older.sort(key=lambda p: -held[p])
                stay = {*older[: self.budget - self.recent]}
                stay |= set(range(self.prompt - self.recent, self.prompt))
                held = self.held[key] = {p: m for p, m in held.items() if p in stay}
            if len(held) == self.budget:  # make room for the next token
                least = min((p for p in held if p <= token + 1 - self.recent), key=held.get)
                del held[least]
                self.evicted += 1


def policy_of(compressor, prompt, sets):
    if isinstance(compressor, StreamingLLM):
        window = compressor.budget - compressor.sinks
        return Streaming(sinks=compressor.sinks, window=window, reindex=compressor.reindex)
    if isinstance(compressor, H2O):
        return Heavy(
            prompt=prompt,
            sets=sets,
            budget=compressor.budget,
            recent=compressor.recent,
            decode_scores=compressor.decode_scores,
        )
    budgets = compressor.budgets(WIDTH, len(sets))
    window, kernel = compressor.window, compressor.kernel
    return Observed(prompt=prompt, sets=sets, budgets=budgets, window=window, kernel=kernel)


CASES = [
    StreamingLLM(budget=6, sinks=2),
    StreamingLLM(budget=5, sinks=1, reindex=False),
    SnapKV(budget=6, window=3, kernel=3),
    PyramidKV(budget=7, window=2, kernel=1, beta=5),
    H2O(budget=6),
    H2O(budget=5, recent=1, decode_scores=False),
]
QUICK = {("fusedkv", 0), ("fusedkv", 2), ("mha", 3), ("fusedkv", 4)}


def cases():
    return [
        pytest.param(
            layout,
            compressor,
            id=f"{compressor.title}-{compressor.budget}-{layout}",
            marks=() if (layout, i) in QUICK else pytest.mark.slow,
        )
        for layout in ("mha", "fusedkv")
        for i, compressor in enumerate(CASES)
    ]


@pytest.mark.parametrize("layout, compressor", cases())
def test_decoding_equals_the_simulation(layout, compressor):
    model, drawn, rows, sets = models(layout)
    check(model, drawn, rows, compressor, lambda length: policy_of(compressor, length, sets))


@pytest.mark.parametrize("sinks", [2, 0])
def test_layers_of_different_rotary_embeddings(sinks):
    """Two full layers of the usual one, one with none, three windows of another."""
    config = small_config(
        "0_1s4_2_3s4_4_5s4",
        qk_norm=True,
        window_rope=fkv.RopeConfig(theta=100.0),
        nope_layers=(2,),
    )
    drawn, compressor = draw(config), StreamingLLM(budget=6, sinks=sinks)
    windows = dict.fromkeys((1, 3, 5), 4)
    thetas = dict.fromkeys((1, 3, 5), 100.0) | {2: None}

    def policy(length):
        return Streaming(sinks=sinks, window=6 - sinks, windows=windows, thetas=thetas)

    def dense(length):
        return Streaming(window=length, windows=windows, thetas=thetas)

    check(build(config, drawn), drawn, [own(i) for i in range(6)], compressor, policy, dense)


def test_layers_that_share_streams_and_rotate_in_different_ways_are_refused():
    config = small_config("0_1_k2v0_3_4_5", nope_layers=(2,))
    with pytest.raises(CompressionError, match="layers 0 and 2 read the same streams.*reindex=F"):
        StreamingLLM().check(config)
    StreamingLLM(reindex=False).check(config)


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_window_of_one_where_tokens_do_not_see_themselves_is_refused(sinks):
    config, message = small_config("lckv"), f"window of 1 beside sinks={sinks}, but in layer 1, .*"
    with pytest.raises(CompressionError, match=f"{message} use budget={sinks + 2} or more"):
        StreamingLLM(budget=sinks + 1, sinks=sinks).check(config)
    StreamingLLM(budget=sinks + 2, sinks=sinks).check(config)
    StreamingLLM(budget=sinks + 1, sinks=sinks).check(small_config("fusedkv"))


def check(model, drawn, rows, compressor, policy, dense=lambda length: Policy()):
    """Decoding equals the simulation of a policy, and differs from that of `dense`."""
    cache = fkv.KVCache.create(model.config, batch_size=2, max_length=WIDTH + LATER)
    prompts = np.where(np.arange(WIDTH) < PROMPTS[:, None], TOKENS[:, :WIDTH], 0)
    found, cache = fkv.prefill(
        model, *map(jnp.asarray, (prompts, PROMPTS)), cache, compression=compressor
    )
    found = [found]
    for step in range(LATER):
        token = TOKENS[np.arange(2), PROMPTS + step].astype(np.int32)
        out, cache = fkv.decode_step(model, jnp.asarray(token), cache)
        found.append(out)
    whole = []
    for b, length in enumerate(PROMPTS):
        expected = logits(drawn, rows, TOKENS[b, : length + LATER], policy(length))
        np.testing.assert_allclose(np.stack(found)[:, b], expected[length - 1 :], atol=5e-4)
        other = logits(drawn, rows, TOKENS[b, : length + LATER], dense(length + LATER))
        whole.append(np.abs(expected - other).max())
    assert min(whole) > 0.05  # the methods make a difference, in every row
