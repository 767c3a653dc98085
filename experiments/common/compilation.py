"""Compiled programs are kept on disk, so that the second run of a command starts in seconds."""

import hashlib
import importlib.util
import os
import pathlib
import platform
import sys

_MAX_BYTES = 4 * 2**30  # the least recently used go first
_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.2,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}
_OFF = ("0", "false", "no", "off")


def keep_compiled_programs() -> pathlib.Path | None:
    """Turn JAX's compilation cache on, in `~/.cache/fusedkv_jax` (or below XDG_CACHE_HOME).

    JAX's own variables come first: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false turns it off. A home that cannot be written does, too.

    Returns:
      The folder; None if this changed nothing.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in _OFF:
        return None
    try:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(home) / "fusedkv_jax" / "compiled" / kind_of_processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    if not os.access(folder, os.W_OK):
        return None
    settings = _SETTINGS | {"jax_compilation_cache_dir": str(folder)}
    if importlib.util.find_spec("filelock"):  # what JAX needs for a bound
        settings["jax_compilation_cache_max_size"] = _MAX_BYTES
    for name, value in settings.items():
        if name.upper() not in os.environ:
            os.environ[name.upper()] = str(value)
            if "jax" in sys.modules:  # it has read the variables already
                sys.modules["jax"].config.update(name, value)
    return folder


def kind_of_processor() -> str:
    """A short name of this kind of processor: compiled code is only good for its own kind."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
