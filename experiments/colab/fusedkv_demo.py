# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/fusedkv_jax/fusedkv_jax/blob/main/experiments/colab/fusedkv_demo.ipynb)
#
# # FusedKV: half the KV cache
#
# In a FusedKV model ([arXiv 2512.03870](https://arxiv.org/abs/2512.03870)) the upper half of the
# layers keeps no keys and values. Each of them rebuilds both, when it reads them, as a learned
# mix of two lower layers' caches. The cache is half as large, and a prompt passes through half
# of the layers.
#
# This notebook trains a FusedKV model and the standard transformer (`mha`) on the source code of
# Python's standard library, byte by byte, and compares their losses, the text they write and
# their caches. It runs on a TPU (the free v5e-1 is enough), a GPU or a CPU: on a CPU it is a toy
# that takes about a minute and learns little.

# %% [markdown]
# ## Install
#
# Skipped where the package is already there. Colab's own jax stays if it is new enough; on a TPU
# the extra keeps libtpu at the version that jax needs. If pip replaces jax, restart the session
# and run from the top.

# %%
import importlib.util

if importlib.util.find_spec("fusedkv_jax") is None:
    extra = "[tpu]" if importlib.util.find_spec("libtpu") else ""
    # %pip install -q "fusedkv_jax{extra} @ git+https://github.com/fusedkv_jax/fusedkv_jax"
    importlib.invalidate_caches()

# %% [markdown]
# ## Machine

# %%
import importlib.metadata
import pathlib
import platform

import jax
from IPython.display import Image, display

import fusedkv_jax as fkv
from experiments.common import completions, pictures, runs
from fusedkv_jax import costs, training
from fusedkv_jax.data import DataConfig, tokenizers

print("python", platform.python_version())
for name in ("fusedkv_jax", "jax", "jaxlib", "flax"):
    print(name, importlib.metadata.version(name))

device = jax.devices()[0]
memory = device.memory_stats()  # None on a CPU
limit = f"{memory['bytes_limit'] / 2**30:.1f} GiB" if memory else "not reported"
print(f"{len(jax.devices())} x {device.device_kind}, memory of one: {limit}")

# %% [markdown]
# ## Experiment
#
# One dataclass holds model, data, optimizer and schedule. The two runs differ in `layout` alone.


# %% tags=["experiment"]
def experiment(layout, platform, old_gpu=False):
    """The run for a platform, "tpu", "gpu" or "cpu"; GPUs before Ampere have no bfloat16."""
    if platform == "cpu":
        model: dict = dict(num_layers=4, d_model=64, num_heads=2, d_ff=192, max_length=256)
        data: dict = dict(seq_len=64, batch_size=8, max_documents=100)
        train: dict = dict(steps=40, log_every=10, eval_every=20, eval_batches=4)
        learning_rate = 1e-2
    else:
        model = dict(num_layers=12, d_model=512, num_heads=8, d_ff=1536, max_length=2048)
        data = dict(seq_len=512, batch_size=16)
        train = dict(steps=1000, log_every=20, eval_every=200, eval_batches=16)
        learning_rate = 2e-3
        if old_gpu:
            model |= dict(num_layers=8, d_model=256, num_heads=4, d_ff=768)
        else:
            model |= dict(dtype="bfloat16")
    return training.ExperimentConfig(
        name=layout,
        model=fkv.ModelConfig(
            vocab_size=258, layout=layout, init_std=model["d_model"] ** -0.5, **model
        ),
        data=DataConfig(source="python_stdlib", holdout_fraction=0.05, **data),
        optimizer=training.OptimizerConfig(learning_rate=learning_rate, warmup_steps=20),
        train=training.TrainConfig(**train),
    )


# %%
capability = getattr(device, "compute_capability", None)
old_gpu = capability is not None and float(capability) < 8
LAYOUTS = ("mha", "fusedkv")
configs = {layout: experiment(layout, device.platform, old_gpu) for layout in LAYOUTS}
for layout, config in configs.items():
    print(f"{layout}: {costs.parameter_count(config.model):,} parameters")
print(fkv.layouts.draw(configs["fusedkv"].model.kv_layout))

# %% [markdown]
# ## Training
#
# Running the second cell again goes on after an interruption, from the last checkpoint. To keep the
# runs beyond the session, mount Google Drive and name a folder there.

# %%
workdir = pathlib.Path("runs") / f"fusedkv_demo_{device.platform}"
workdir.mkdir(parents=True, exist_ok=True)

# %%
finished = {layout: runs.complete(config, workdir / layout) for layout, config in configs.items()}

# %% [markdown]
# ## Loss
#
# Both have seen the same tokens in the same order. Bits per byte on files that were held out:

# %%
for layout, run in finished.items():
    print(f"{layout:>8}: {run.bits_per_byte:.3f} bits per byte")
histories = {layout: run.history for layout, run in finished.items()}
pictures.draw_loss_curves(histories, workdir / "loss_curves.png")
display(Image(workdir / "loss_curves.png"))

# %% [markdown]
# ## What the upper layers read
#
# Each row is a layer without a cache of its own, each column a cached stream. The weights differ
# by head and channel; on the left is their mean size, on the right their mean.

# %%
models = {layout: training.load_model(workdir / layout)[0] for layout in LAYOUTS}
pictures.draw_fusion_weights(models["fusedkv"], workdir / "fusion_weights.png")
display(Image(workdir / "fusion_weights.png"))

# %% [markdown]
# ## Text

# %%
tokenizer = tokenizers.load("byte")
sampling = fkv.SamplingParams(temperature=0.6, top_p=0.95, seed=0, max_tokens=100)
for layout, model in models.items():
    print(f"--- {layout}")
    for completion in completions.continue_texts(
        model, tokenizer, ["import os\n\n\ndef read(path):\n"], sampling
    ):
        print(f"{tokenizer.decode(completion.prompt_token_ids)}{completion.text}")

# %% [markdown]
# ## Cache
#
# The arrays that decoding allocates, and what a token adds to them.

# %%
for layout, config in configs.items():
    cache = fkv.KVCache.create(config.model, batch_size=1, max_length=config.model.max_length)
    token = costs.cache_bytes_per_token(config.model, config.model.dtype)
    print(
        f"{layout:>8}: {cache.nbytes / 2**20:.2f} MiB for {config.model.max_length} tokens, "
        f"{token:,} bytes per token, prompts pass {config.model.kv_layout.prefill_depth} of "
        f"{config.model.num_layers} layers"
    )

# %% [markdown]
# ## Going on
#
# `python -m experiments.train --help` trains any layout at any size,
# `python -m experiments.costs` says what a layout costs before anything is trained, and
# `del models; jax.clear_caches()` frees the memory of this notebook.
