"""Analytic FLOPs against the compiler's count of the model that really runs."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fusedkv_jax import Decoder, KVCache, costs
from fusedkv_jax.config import MLAConfig, ModelConfig


@pytest.mark.usefixtures("without_type_checks")
class TestAgainstTheCompiler:
    """XLA's count of the reference implementation, which computes the masked pairs as well.

    It also counts norms, rotations, softmax and activations: some percent at these widths.
    """

    B, T, S = 2, 32, 64
    MLA = dict(mla=MLAConfig(kv_lora_rank=32, nope_dim=24, rope_dim=8, v_dim=32))

    def measure(self, config, tokens, call) -> float:
        graph, state = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
        cache = KVCache.create(config, batch_size=self.B, max_length=self.S)

        def run(state, tokens, cache):
            return call(nnx.merge(graph, state), tokens, cache)

        zeros = jnp.zeros((self.B, tokens), jnp.int32)
        return jax.jit(run).lower(state, zeros, cache).compile().cost_analysis()["flops"]

    def config(self, layout, **changes) -> ModelConfig:
        fields = dict(
            vocab_size=512,
            num_layers=4,
            d_model=128,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            d_ff=256,
            scan_layers=False,  # XLA counts a loop's body once
            attention="reference",
        )
        return ModelConfig(layout=layout, **(fields | changes))

    @pytest.mark.parametrize("layout", ["mha", "fusedkv", "resformer", "svformer"])
    def test_forward(self, layout):
        config = self.config(layout)
        found = self.measure(config, self.T, lambda model, tokens, cache: model(tokens))
        masked = 4 * 128 * 4 * (self.T - (self.T + 1) / 2)
        expected = costs.train_flops_per_token(config, self.T) / 3 + masked
        assert found == pytest.approx(self.B * self.T * expected, rel=0.03)

    @pytest.mark.parametrize("layout", ["mha", "cla", "fusedkv", "yoco_pp"])
    def test_prefill(self, layout):
        config = self.config(layout)
        depth = config.kv_layout.prefill_depth
        rows = jnp.full(self.B, self.T)
        found = self.measure(config, self.T, lambda model, t, c: model.extend(t, rows, c))
        visible = depth * self.T * (self.T + 1) / 2 + (4 - depth) * self.T
        masked = 4 * 128 * ((depth * self.T + 4 - depth) * self.S - visible)
        expected = costs.prefill_flops(config, self.T) + masked
        assert found == pytest.approx(self.B * expected, rel=0.04)

    @pytest.mark.parametrize("layout", ["mha", "fusedkv"])
    @pytest.mark.parametrize("geometry", [{}, MLA], ids=["gqa", "mla"])
    def test_decode(self, layout, geometry):
        config = self.config(layout, **geometry)
        rows = jnp.ones(self.B, jnp.int32)
        found = self.measure(config, 1, lambda model, t, c: model.extend(t, rows, c))
        assert found == pytest.approx(self.B * costs.decode_flops(config, self.S), rel=0.07)
