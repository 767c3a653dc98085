"""What small storage types of the cache cost in perplexity."""

from experiments.benchmarks.report import Measurement, Target
from experiments.common import runs
from fusedkv_jax import training
from fusedkv_jax.evaluation import at_length, total
from fusedkv_jax.evaluation.longcontext_cases import heldout_texts

# Largest increase of the perplexity, as a share of it.
BOUNDS = {"int8": 0.005, "float8_e4m3fn": 0.03, "int4": 0.03}


def measure_storage(run: runs.FinishedRun, *, texts: int) -> Measurement:
    """Perplexity of held-out text that is read through a cache of each storage type."""
    model, config, _ = training.load_model(run.workdir)
    # As long as can be: int4 leaves the newest 128 tokens exact.
    length = model.config.max_length
    documents = heldout_texts(config, length + 1, texts)
    rows, targets, whole = [], [], {}
    for dtype in (model.config.dtype, *BOUNDS):
        parts = at_length(model, documents, chunk=length // 4, cache_dtype=dtype)
        found = {"all": total(parts).perplexity, "last quarter": parts[-1].perplexity}
        whole = whole or found
        change = {name: value / whole[name] - 1 for name, value in found.items()}
        rows.append(
            {
                "cache": dtype,
                "perplexity": found["all"],
                "change": change["all"],
                "last quarter": found["last quarter"],
                "its change": change["last quarter"],
            }
        )
        if dtype in BOUNDS:
            name = f"change of the perplexity with {dtype}"
            targets.append(Target(name, change["all"], "<=", BOUNDS[dtype]))
    return Measurement(
        "Storage types: perplexity of held-out text read through the cache",
        {
            "model": config.name,
            "texts": texts,
            "length": length,
            "layout": config.model.kv_layout.spec,
        },
        rows,
        targets,
    )
