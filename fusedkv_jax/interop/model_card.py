"""The model card of an export: what the model is, what its cache costs, how to load it."""

from __future__ import annotations

from collections.abc import Mapping

from fusedkv_jax import costs, layouts
from fusedkv_jax.config import ModelConfig


def model_card(config: ModelConfig, model_type: str, own: bool, facts: Mapping[str, str]) -> str:
    """README.md of the folder.

    Args:
        config: of the model.
        model_type: that of config.json.
        own: the folder is in our own format.
        facts: rows of the table beside those that follow from the configuration.
    """
    layout = config.kv_layout
    cached = costs.cache_bytes_per_token(config, "bfloat16")
    plain = costs.cache_bytes_per_token(
        config.replace(layout=layouts.ordinary(config.num_layers)), "bfloat16"
    )
    rows = {
        "parameters": f"{costs.parameter_count(config):,}",
        "layout": layout.spec or "see the drawing",
        "cache, bytes per token in bfloat16": f"{cached:,} ({cached / plain:.0%} of {plain:,})",
        "layers that prompt tokens pass through": f"{layout.prefill_depth} of {layout.num_layers}",
        **facts,
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())

    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- fusedkv_jax
- {model_type}
---

A decoder, written by fusedkv_jax (method: [arXiv 2512.03870](https://arxiv.org/abs/2512.03870)).

| | |
|---|---|
{table}

Which layer caches its keys and values (in brackets), and what the others read:

```
{layouts.draw(layout)}
```

## Loading it

```python
import fusedkv_jax as fkv

model = fkv.interop.load_huggingface("FOLDER")
```

{_OWN if own else _FAMILY}"""


_FAMILY = """```python
import transformers

model = transformers.AutoModelForCausalLM.from_pretrained("FOLDER")
```
"""

_OWN = """In PyTorch, `modeling_fusedkv.py` computes it; it is here and in the package, and may be
copied. It documents the fields of `config.json`, and keeps no cache.

```python
import transformers

model = transformers.AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
```
"""


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
