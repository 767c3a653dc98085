"""A cell as a model that trains, predicts and shows what it attends to, in either framework."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.study.recall.cells import Cell
from fusedkv_jax import training
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import runs
from fusedkv_jax.training.early_exit import make_objective
from fusedkv_jax.training.state import TrainState, abstract_model, create_state
from fusedkv_jax.training.step import BATCH_KEYS, StepOptions, make_train_step

Batch = Mapping[str, np.ndarray]


class Learner(Protocol):
    """A model in training."""

    def step(self, batch: Batch, step: int) -> tuple[float, float]:
        """Update by a batch; the loss, and the norm of the gradients before clipping."""
        ...

    def predict(self, tokens: np.ndarray) -> np.ndarray:
        """The likeliest next token at each place of rows [B, T] of one document each."""
        ...

    def attention(self, tokens: np.ndarray) -> np.ndarray | None:
        """What each layer attends to, [L, B, N, T, T]; None where nobody can tell."""
        ...


class TorchLearner:
    """The independent model."""

    def __init__(self, cell: Cell) -> None:
        import torch

        from experiments.study.recall import torch_model, torch_training

        torch.set_num_threads(1)
        config = cell.config()
        model, optimizer = config.model, config.optimizer
        self.model = torch_model.Recall(
            torch_model.Shape(
                vocabulary=model.vocab_size,
                width=model.d_model,
                heads=model.num_heads,
                kv_heads=model.kv_heads,
                hidden=model.d_ff,
                init_std=model.init_std,
                layers=torch_model.reads(cell.layout, model.num_layers),
                qk_norm=model.qk_norm,
                embedding_scale=model.embedding_scale,
            ),
            cell.seed,
        )
        self.trainer = torch_training.Trainer(
            self.model,
            torch_training.Settings(
                steps=config.train.steps,
                warmup=optimizer.warmup_steps,
                peak=optimizer.learning_rate,
                exit_scale=config.early_exit.loss_scale,
            ),
        )
        self._torch = torch

    def step(self, batch: Batch, step: int) -> tuple[float, float]:
        return self.trainer.step(batch, step)

    def predict(self, tokens: np.ndarray) -> np.ndarray:
        with self._torch.inference_mode():
            rows = [
                self._torch.tensor(tokens[i : i + 16]).long() for i in range(0, len(tokens), 16)
            ]
            found = [self.model(row, [row.shape[1]] * len(row))[-1] for row in rows]
            return np.concatenate([self.model.logits(x).argmax(-1).numpy() for x in found])

    def attention(self, tokens: np.ndarray) -> np.ndarray:
        seen: list = []
        with self._torch.inference_mode():
            rows = self._torch.tensor(tokens).long()
            self.model(rows, [tokens.shape[1]] * len(tokens), seen)
        return np.stack([x.numpy() for x in seen])


class JaxLearner:
    """The library's model, loss, optimizer and step."""

    def __init__(self, cell: Cell) -> None:
        config = cell.config()
        steps, model = config.train.steps, config.model
        self.graphdef = abstract_model(model)[0]
        optimizer = training.make_optimizer(config.optimizer, steps)
        self.state: TrainState = create_state(model, optimizer, config.train.seed)
        options = StepOptions(
            objective=make_objective(config.early_exit, model.num_layers, steps, config.train.seed)
        )
        schedule = training.learning_rate_schedule(config.optimizer, steps)
        step = make_train_step(self.graphdef, optimizer, schedule, options)
        self._step = jax.jit(step, donate_argnums=0)
        self._predict = jax.jit(
            lambda params, tokens: nnx.merge(self.graphdef, params)(tokens).argmax(-1)
        )

    def step(self, batch: Batch, step: int) -> tuple[float, float]:
        assert int(self.state.step) == step
        arrays = {name: jnp.asarray(batch[name]) for name in BATCH_KEYS}
        self.state, metrics = self._step(self.state, arrays)
        return float(metrics["loss"]), float(metrics["grad_norm"])

    def predict(self, tokens: np.ndarray) -> np.ndarray:
        rows = [tokens[i : i + 4] for i in range(0, len(tokens), 4)]
        found = [self._predict(self.state.params, jnp.asarray(row)) for row in rows]
        return np.concatenate([np.asarray(x) for x in found])

    def attention(self, tokens: np.ndarray) -> None:
        return None  # fused kernels keep no weights

    def moments(self) -> nnx.State:
        """Adam's first moments, in the form of the parameters."""
        (found,) = (
            part
            for part in jax.tree.leaves(self.state.opt_state, is_leaf=_is_adam)
            if _is_adam(part)
        )
        return found.mu


def _is_adam(part: object) -> bool:
    return isinstance(part, optax.ScaleByAdamState)


def learner(cell: Cell) -> Learner:
    """The cell's model before its first step."""
    return {"torch": TorchLearner, "jax": JaxLearner}[cell.framework](cell)


def in_torch_names(config: ModelConfig, params: nnx.State) -> Iterator[tuple[str, np.ndarray]]:
    """The library's parameters (or what has their form) by the names of the model in PyTorch."""
    fusing = {
        kind: [i for i, layer in enumerate(config.kv_layout.layers) if layer.stream(kind).weights]
        for kind in ("key", "value")
    }
    for keys, variable in nnx.to_flat_state(params):
        path: tuple[Any, ...] = keys
        array, name = np.asarray(variable.get_value()), path[-1]
        if name == "scale":
            name = path[-2]
        if path[0] == "runs":
            layers = list(runs(config.kv_layout)[path[1]].layers(path[2]))
        elif path[0] == "mixing":
            kind = ("key", "value")[path[2]]
            layers, name = fusing[kind], f"{kind}_weights"
            array = array.reshape(*array.shape[:3], -1)  # one channel where there is one for a head
        else:
            yield str(name), array
            continue
        for number, one in zip(layers, array, strict=True):
            yield f"layers.{number}.{name}", one
