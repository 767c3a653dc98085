"""Exchange with other libraries' checkpoints."""

from typing import TYPE_CHECKING

from fusedkv_jax.lazy import lazy_names

__all__ = [
    "FolderError",
    "GgufError",
    "TensorError",
    "config_from_huggingface",
    "config_to_huggingface",
    "copy_tokenizer",
    "folder_config",
    "gguf_config",
    "is_own_format",
    "load_gguf",
    "load_huggingface",
    "save_gguf_tokenizer",
    "save_huggingface",
    "with_layout",
]

if TYPE_CHECKING:
    from fusedkv_jax.interop.companions import copy_tokenizer
    from fusedkv_jax.interop.export import save_huggingface
    from fusedkv_jax.interop.export_config import config_to_huggingface
    from fusedkv_jax.interop.gguf import gguf_config, load_gguf
    from fusedkv_jax.interop.gguf_file import GgufError
    from fusedkv_jax.interop.gguf_tokenizer import save_gguf_tokenizer
    from fusedkv_jax.interop.huggingface import (
        TensorError,
        folder_config,
        is_own_format,
        load_huggingface,
    )
    from fusedkv_jax.interop.huggingface_config import config_from_huggingface, with_layout
    from fusedkv_jax.interop.safetensors_folder import FolderError
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        __all__,
        {
            "companions": ["copy_tokenizer"],
            "export": ["save_huggingface"],
            "export_config": ["config_to_huggingface"],
            "gguf": ["gguf_config", "load_gguf"],
            "gguf_file": ["GgufError"],
            "gguf_tokenizer": ["save_gguf_tokenizer"],
            "huggingface": ["TensorError", "folder_config", "is_own_format", "load_huggingface"],
            "huggingface_config": ["config_from_huggingface", "with_layout"],
            "safetensors_folder": ["FolderError"],
        },
    )
