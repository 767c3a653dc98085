"""The Llama of Hugging Face transformers on PyTorch, of the geometry of one of our models."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from fusedkv_jax.config import ModelConfig


def missing() -> str:
    """Why the comparison cannot be made; empty if it can."""
    absent = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    return f"{' and '.join(absent)} not installed (pip install '.[reference]')" if absent else ""


def model(config: ModelConfig) -> Any:
    """A Llama with random weights in float32, attention by PyTorch's fused operation."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.channels,
            max_position_embeddings=config.max_length,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def train_step(config: ModelConfig, tokens: np.ndarray, targets: np.ndarray) -> Callable[[], float]:
    """A step of AdamW with clipping by global norm, in PyTorch's fused versions; gives the loss."""
    import torch

    llama = model(config).train()
    optimizer = torch.optim.AdamW(
        llama.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    inputs, labels = (torch.tensor(array, dtype=torch.long) for array in (tokens, targets))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = llama(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0, foreach=True)
        optimizer.step()
        return loss.item()

    return step


def generator(
    config: ModelConfig, prompts: np.ndarray, new_tokens: int, *, compiled: bool
) -> Callable[[], object]:
    """Greedy `generate` with a static cache, its forward pass compiled by PyTorch on request."""
    import torch
    import transformers

    llama = model(config).eval()
    inputs = torch.tensor(prompts, dtype=torch.long)
    options: dict[str, Any] = {"disable_compile": True}
    if compiled:
        compile_config = transformers.CompileConfig(fullgraph=False, mode="default")
        # transformers' own switch for CPU, which its class does not declare.
        setattr(compile_config, "_compile_all_devices", True)  # noqa: B010
        options = {"compile_config": compile_config}

    def generate() -> Any:
        with torch.inference_mode():
            return llama.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
                **options,
            )

    return generate
