"""What an implementation tells the shared tests about itself, as the base of their classes."""

import jax.numpy as jnp
import pytest

import pallas_kernels
from tests.pallas_kernels.cases import CASES, ROUNDED, as_jax, draw, needs


class Implementation:
    """Set what differs, then derive a test class from it and from each class of shared tests:

        class Tpu(Implementation):
            implementation = "tpu"
            unsupported = frozenset({"softcap"})

        class TestAttention(Tpu, AttentionCases): ...
        class TestQuantized(Tpu, QuantizedCases): ...
        class TestPaged(Tpu, PagedCases): ...

    - `implementation`, if `pallas_kernels.attention` reaches the code on this machine; otherwise
      override `attend(arguments, options)`, which gets (q, keys, values, key_weights,
      value_weights) and the keyword arguments of `attention`, and returns (out, lse): give
      `cases.call_of` of both to the kernel, with `interpret=True`. For pages override
      `attend_pages` and `attend_ragged`.
    - `unsupported`: words of `cases.needs`, and "gradients", "residuals" (an lse),
      "wide_sources" (float32 sources beside 16-bit queries), "chunk" (pages, several queries),
      "int8", "int4", "float8_e4m3fn", ...: such tests are left out. Only for what raises
      NotImplementedError; nothing else may be left out.
    - `cases`, `rounded`, `paged`: names of CASES, ROUNDED and PAGED to run; `CORE` where each
      is slow.
    - `examples`: random shapes that are tried.
    - `narrow`: the 16-bit type of the rounding tests.
    - `tolerance`, `quantized_tolerance`, `paged_tolerance`: of results for float32 queries,
      relative to the largest number of each.
    """

    implementation: str
    unsupported: frozenset[str] = frozenset()
    cases: tuple[str, ...] = tuple(CASES)
    rounded: tuple[str, ...] = tuple(ROUNDED)
    formats: tuple[str, ...] = (
        "int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "int4",
    )  # fmt: skip
    examples = 5
    narrow = "bfloat16"
    tolerance = 2e-5
    quantized_tolerance = 2e-5
    paged_tolerance = 2e-5

    def pytest_generate_tests(self, metafunc):
        for name, values in self.choices().items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values)

    def choices(self):
        """Parameters of the tests by name."""
        return {
            "case": [x for x in self.cases if not needs(x) & self.unsupported],
            "rounded": self.rounded,
            "format": [x for x in self.formats if x not in self.unsupported],
        }

    def attend(self, arguments, options):
        """(out, lse)."""
        arguments, options = as_jax((arguments, options))
        residuals = "residuals" not in self.unsupported
        found = pallas_kernels.attention(
            *arguments, return_residuals=residuals, implementation=self.implementation, **options
        )
        return found if residuals else (found, jnp.zeros(found.shape[:3]))

    def attend_pages(self, q, pages, page_table, kv_lengths, key_weights, value_weights, options):
        """(out, lse)."""
        return pallas_kernels.paged_attention(
            q, pages, page_table, kv_lengths, key_weights, value_weights,
            return_residuals=True, implementation=self.implementation, **options,
        )  # fmt: skip

    def attend_ragged(self, q, keys, values, rows, key_weights, value_weights, options):
        """(out, lse)."""
        return pallas_kernels.ragged_attention(
            q, keys, values, rows, key_weights, value_weights,
            return_residuals=True, implementation=self.implementation, **options,
        )  # fmt: skip

    def draw(self, name, shape):
        """Arguments and cotangents; none for an lse that is not returned."""
        arguments, (dout, dlse) = draw(name, shape)
        return arguments, (dout, dlse * ("residuals" not in self.unsupported))

    def skip_without(self, *words):
        missing = self.unsupported & set(words)
        if missing:
            pytest.skip(f"not served: {', '.join(sorted(missing))}")
