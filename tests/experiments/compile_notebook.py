"""Compile a notebook's training and decode steps for one v5e chip, and print their memory as JSON.

Run by test_colab.py with the script of a notebook; needs libtpu, no TPU.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import jupytext
import numpy as np
from flax import nnx
from jax.experimental import topologies

import fusedkv_jax as fkv
from fusedkv_jax import training
from fusedkv_jax.data import DataConfig
from fusedkv_jax.training.state import abstract_model, abstract_state


def load_experiment(path):
    """The function `experiment` of the notebook, from the cell with that tag."""
    notebook = jupytext.read(path)
    (cell,) = [c for c in notebook.cells if "experiment" in c.metadata.get("tags", [])]
    names = {"fkv": fkv, "training": training, "DataConfig": DataConfig}
    exec(cell.source, names)
    return names["experiment"]


@functools.cache  # devices of two calls are not the same device
def chip():
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1)
    )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def on_chip(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip()), tree)


def total_bytes(compiled):
    memory = compiled.memory_analysis()
    return memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes


def compile_train_step(config):
    optimizer = training.make_optimizer(config.optimizer, config.train.steps)
    schedule = training.learning_rate_schedule(config.optimizer, config.train.steps)
    graph, _ = abstract_model(config.model)
    options = training.StepOptions(microbatches=config.train.grad_accumulation)
    step = training.make_train_step(graph, optimizer, schedule, options)
    shape = (config.data.batch_size, config.data.seq_len)
    integers = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: np.zeros(shape, np.int32) for name in integers}
    batch["loss_mask"] = np.zeros(shape, np.float32)
    state = abstract_state(config.model, optimizer)
    return jax.jit(step, donate_argnums=0).lower(on_chip(state), on_chip(batch)).compile()


def compile_decode_step(model_config, cache):
    model = nnx.eval_shape(lambda: fkv.Decoder(model_config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)

    def step(state, token, count, cache):
        return nnx.merge(graph, state).extend(token, count, cache)

    token, count = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    arguments = map(on_chip, (state, token, count, cache))
    return jax.jit(step, donate_argnames="cache").lower(*arguments).compile()


def report(experiment):
    """Bytes of the FusedKV training step, the larger one, and of each layout's decode step."""
    result = {"train": 0, "decode": {}, "decode_aliased": {}, "cache": {}}
    for layout in ("mha", "fusedkv"):
        model = experiment(layout, "tpu").model
        cache = jax.eval_shape(
            lambda model=model: fkv.KVCache.create(model, batch_size=1, max_length=model.max_length)
        )
        arrays = jax.tree.leaves((cache.keys, cache.values))
        decode = compile_decode_step(model, cache)
        result["decode"][layout] = total_bytes(decode)
        result["decode_aliased"][layout] = decode.memory_analysis().alias_size_in_bytes
        result["cache"][layout] = sum(x.size * x.dtype.itemsize for x in arrays)
    result["train"] = total_bytes(compile_train_step(experiment("fusedkv", "tpu")))
    return result


if __name__ == "__main__":
    print(json.dumps(report(load_experiment(sys.argv[1]))))
