"""Training-free compressors of the key/value cache, each with one budget."""

from typing import TYPE_CHECKING

from fusedkv_jax.lazy import lazy_names

__all__ = [
    "H2O",
    "CompressionError",
    "Compressor",
    "DoubleSparsity",
    "MiniCache",
    "PruningReport",
    "PruningStep",
    "PyramidInfer",
    "PyramidKV",
    "SnapKV",
    "StreamingLLM",
    "names",
    "parse",
    "prune_sources",
]

if TYPE_CHECKING:
    from fusedkv_jax.compression.compressor import CompressionError, Compressor
    from fusedkv_jax.compression.double_sparsity import DoubleSparsity
    from fusedkv_jax.compression.h2o import H2O
    from fusedkv_jax.compression.minicache import MiniCache
    from fusedkv_jax.compression.pruning import PruningReport, PruningStep, prune_sources
    from fusedkv_jax.compression.pyramidinfer import PyramidInfer
    from fusedkv_jax.compression.registry import names, parse
    from fusedkv_jax.compression.snapkv import PyramidKV, SnapKV
    from fusedkv_jax.compression.streaming import StreamingLLM
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        __all__,
        {
            "compressor": ["CompressionError", "Compressor"],
            "double_sparsity": ["DoubleSparsity"],
            "h2o": ["H2O"],
            "minicache": ["MiniCache"],
            "pruning": ["PruningReport", "PruningStep", "prune_sources"],
            "pyramidinfer": ["PyramidInfer"],
            "registry": ["names", "parse"],
            "snapkv": ["PyramidKV", "SnapKV"],
            "streaming": ["StreamingLLM"],
        },
    )
