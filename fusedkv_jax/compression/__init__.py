"""Training-free compressors of the key/value cache, each with one budget."""

from fusedkv_jax.compression.compressor import CompressionError, Compressor
from fusedkv_jax.compression.double_sparsity import DoubleSparsity
from fusedkv_jax.compression.h2o import H2O
from fusedkv_jax.compression.minicache import MiniCache
from fusedkv_jax.compression.pruning import PruningReport, PruningStep, prune_sources
from fusedkv_jax.compression.pyramidinfer import PyramidInfer
from fusedkv_jax.compression.registry import names, parse
from fusedkv_jax.compression.snapkv import PyramidKV, SnapKV
from fusedkv_jax.compression.streaming import StreamingLLM

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
