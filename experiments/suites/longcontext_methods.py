"""What the long-context suite compares: compressors that the user names, or all of them."""

from collections.abc import Sequence

from fusedkv_jax import compression
from fusedkv_jax.cache import STORAGE_TYPES
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.evaluation import Method
from fusedkv_jax.validation import nearest_or_all

WHOLE = Method("whole cache")
DTYPES = ("int8", "float8_e4m3fn", "int4")
SHARES = (8, 4, 2)  # a budget is the length over one of these


def methods(specs: Sequence[str], dtypes: Sequence[str]) -> list[Method]:
    """Every compressor with every storage type; the whole cache first.

    Args:
      specs: compressors, as `fusedkv_jax.compression.parse` reads them, or "none"; without any,
        the storage types alone are compared.
      dtypes: storage types; with none, the model's activation type.

    Raises:
      ValueError: an unknown compressor, field or storage type, or a refused value.
    """
    for dtype in dtypes:
        if dtype not in STORAGE_TYPES:
            found = nearest_or_all(dtype, STORAGE_TYPES)
            raise ValueError(f"cache_dtype={dtype} is unknown{found}")
    found = [WHOLE]
    for spec in ("" if spec == "none" else spec for spec in specs or [""]):
        compressor = compression.parse(spec) if spec else None
        for dtype in dtypes or [None]:
            name = " ".join(filter(None, (spec, dtype)))
            if name:
                found.append(Method(name, compressor, dtype))
    return list({method.name: method for method in found}.values())


def defaults(length: int) -> list[Method]:
    """Storage types, all compressors at budgets of an eighth to half of the length, and SnapKV
    in 8 bits.

    Double Sparsity reads its budget and keeps everything; MiniCache and PyramidInfer take shares.
    """
    window = max(1, length // 32)
    specs = []
    for budget in (max(2, length // share) for share in SHARES):
        sinks = f",sinks={budget // 2}" if budget < 8 else ""
        specs += [
            f"snapkv:budget={budget},window={window}",
            f"pyramidkv:budget={budget},window={window}",
            f"streaming_llm:budget={budget}{sinks}",
            f"h2o:budget={budget}",
            f"double_sparsity:budget={budget}",
        ]
    specs += [f"pyramidinfer:budget={share}" for share in (0.25, 0.5, 0.9)]
    specs += [f"minicache:budget={share}" for share in (0.05, 0.25)]
    both = f"snapkv:budget={max(2, length // 4)},window={window}"
    return [*methods([], DTYPES), *methods(specs, [])[1:], *methods([both], ["int8"])[1:]]


def refusal(method: Method, config: ModelConfig) -> str:
    """Why a model cannot use a compressor; empty if it can."""
    if method.compression is not None:
        try:
            method.compression.check(config)
        except ValueError as error:
            return str(error)
    return ""
