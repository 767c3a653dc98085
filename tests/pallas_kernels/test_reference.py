"""The plain definition passes the cases."""

from tests.pallas_kernels.attention_cases import AttentionCases


class TestReference(AttentionCases):
    implementation = "reference"
