"""The plain definition passes the cases."""

from tests.pallas_kernels.attention_cases import AttentionCases
from tests.pallas_kernels.cases import CORE
from tests.pallas_kernels.implementation import Implementation
from tests.pallas_kernels.ragged_cases import RaggedCases
from tests.pallas_kernels.stored_cases import PagedCases, QuantizedCases


class Reference(Implementation):
    implementation = "reference"
    cases = ("full", "two_tokens", "segments_unsorted", *CORE)
    rounded = ("fused_80", "cancelling")  # it computes in float32
    examples = 3


class TestReference(Reference, AttentionCases):
    pass


class TestReferenceQuantized(Reference, QuantizedCases):
    pass


class TestReferencePaged(Reference, PagedCases):
    pass


class TestReferenceRagged(Reference, RaggedCases):
    ragged = ("int8",)
