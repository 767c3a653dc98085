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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/fusedkv_jax/fusedkv_jax/blob/main/experiments/colab/design_a_layout.ipynb)
#
# # Design a layout
#
# A *layout* says, layer by layer, whose keys and values attention reads. A layer that projects a
# stream caches it; a layer that does not reads what others have cached. This notebook writes
# layouts in one line, draws them, computes what they cost, and trains toys of them side by side.
#
# It runs on a TPU (the free v5e-1 is enough), a GPU or a CPU; on a CPU the models are toys that
# learn little, and the losses say nothing about larger ones.

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
import matplotlib.pyplot as plt
from IPython.display import Image, display

import fusedkv_jax as fkv
from experiments.common import pictures, runs
from fusedkv_jax import costs, layouts, training
from fusedkv_jax.data import DataConfig

print("python", platform.python_version())
for name in ("fusedkv_jax", "jax", "jaxlib", "flax"):
    print(name, importlib.metadata.version(name))

device = jax.devices()[0]
small = device.platform == "cpu"
print(f"{len(jax.devices())} x {device.device_kind}")

# %% [markdown]
# ## The grammar
#
# One token for each layer, from the bottom up, joined by `_`:
#
# | token | the layer reads |
# |---|---|
# | `3` | keys and values of layer 3 |
# | `k3v0` | keys of layer 3, values of layer 0 |
# | `f0+3` | a learned fusion of both streams of layers 0 and 3 |
# | `...s64` | the same, through a window of 64 tokens |
# | `...x4` | the same for four layers |
#
# A layer caches what some layer reads from it, itself included. So an ordinary layer names
# itself, and a layer that nobody names caches nothing.

# %%
print(layouts.draw(layouts.parse("0_1_2_3_f0+3x4")))

# %% [markdown]
# Half of the layers cache (`caches`), a decoded token reads 1.5 streams where an ordinary decoder
# reads one (`reads`), and prompts stop halfway (`prefill_depth`). Now the same cache without
# fusion: the upper layers look at the middle layer's keys and the lowest layer's values.

# %%
print(layouts.draw(layouts.parse("0_1_2_3_k3v0x4")))

# %% [markdown]
# What makes no sense is refused, with the reason:

# %%
for text in ("0_1_2_f1+4_4", "0_1_5_3", "1_f0+1_2"):
    try:
        layouts.parse(text)
    except layouts.LayoutError as error:
        print(f"{text:>14}: {error}")

# %% [markdown]
# ## Yours
#
# Change `MINE`. Here: a small cache (three layers of eight), two windowed layers on top of it,
# and three that read it whole.

# %%
MINE = "0_1_2_f0+2s64x2_f0+2x3"
designs = {"mha": "mha", "fusedkv": "fusedkv", "mine": MINE}
mine = layouts.parse(MINE)
print(layouts.draw(mine))

# %% [markdown]
# ## What they cost
#
# Computed, before anything is trained: bytes that a token adds to the cache, bytes that decoding
# one token reads after 8,192, and FLOPs of a prompt of as many.


# %%
def experiment(layout, steps=None):
    """The run of one layout; they differ in nothing else."""
    if small:
        model: dict = dict(d_model=32, num_heads=2, d_ff=64)
        data: dict = dict(seq_len=128, batch_size=4, max_documents=100)
        train: dict = dict(steps=steps or 40, log_every=5, eval_every=40, eval_batches=4)
    else:
        model = dict(d_model=512, num_heads=8, d_ff=1536, dtype="bfloat16")
        data = dict(seq_len=512, batch_size=16)
        train = dict(steps=steps or 1000, log_every=20, eval_every=200, eval_batches=16)
    return training.ExperimentConfig(
        name=layout,
        model=fkv.ModelConfig(
            vocab_size=258,
            num_layers=mine.num_layers,
            layout=layout,
            max_length=8192,
            init_std=model["d_model"] ** -0.5,
            **model,
        ),
        data=DataConfig(source="python_stdlib", holdout_fraction=0.05, **data),
        optimizer=training.OptimizerConfig(learning_rate=1e-2 if small else 2e-3, warmup_steps=10),
        train=training.TrainConfig(**train),
    )


configs = {name: experiment(layout) for name, layout in designs.items()}
print(f"{'':>8} parameters  bytes/token  bytes read   prompt FLOPs")
for name, config in configs.items():
    print(
        f"{name:>8} {costs.parameter_count(config.model):>10,} "
        f"{costs.cache_bytes_per_token(config.model, 'bfloat16'):>12,} "
        f"{costs.decode_cache_reads(config.model, 8192, 'bfloat16'):>11,} "
        f"{costs.prefill_flops(config.model, 8192):>14.3e}"
    )

# %% [markdown]
# ## Train them
#
# The same tokens in the same order. Running the cell again goes on after an interruption.

# %%
workdir = pathlib.Path("runs") / f"design_a_layout_{device.platform}"
finished = {name: runs.complete(config, workdir / name) for name, config in configs.items()}

# %%
histories = {name: run.history for name, run in finished.items()}
pictures.draw_loss_curves(histories, workdir / "loss_curves.png")
display(Image(workdir / "loss_curves.png"))

# %% [markdown]
# ## Compare
#
# Down and to the left is better. One run each: differences of a percent are noise.

# %%
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
for name, run in finished.items():
    size = costs.cache_bytes_per_token(run.config.model, "bfloat16")
    print(f"{name:>8}: {run.bits_per_byte:.3f} bits per byte, {size:,} bytes of cache a token")
    axes.plot(size, run.bits_per_byte, "o")
    axes.annotate(name, (size, run.bits_per_byte), textcoords="offset points", xytext=(5, 4))
axes.set_xlabel("cache, bytes per token")
axes.set_ylabel("held-out bits per byte")
axes.margins(0.2)
figure.savefig(workdir / "comparison.png", dpi=120)
plt.close(figure)
display(Image(workdir / "comparison.png"))

# %% [markdown]
# ## Going on
#
# The string goes wherever a layout goes: `python -m experiments.train --config=demo
# --config.model.num_layers=8 --config.model.layout=0_1_2_f0+2s64x2_f0+2x3 --workdir=runs/mine`
# trains it, and `python -m experiments.compile_for_tpu --preset=4b --topology=v5p:8x8x8` says
# what fits on a slice.
