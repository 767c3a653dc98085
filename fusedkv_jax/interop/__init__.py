"""Exchange with other libraries' checkpoints."""

from fusedkv_jax.interop.huggingface import TensorError, load_huggingface, save_huggingface
from fusedkv_jax.interop.huggingface_config import config_from_huggingface, config_to_huggingface
from fusedkv_jax.interop.safetensors_folder import FolderError

__all__ = [
    "FolderError",
    "TensorError",
    "config_from_huggingface",
    "config_to_huggingface",
    "load_huggingface",
    "save_huggingface",
]
