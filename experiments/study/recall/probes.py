"""What a model in training can do: answers found, and the two steps of an induction circuit."""

import numpy as np

from experiments.study.recall.frameworks import Learner
from fusedkv_jax.data import recall_tasks
from fusedkv_jax.data.recall_forms import TokenForm

EXAMPLES = 16
REPEATS = (8, 64)  # rows, and their tokens: half of them drawn, then the same again
SEED = 1_000  # no training example begins with it


def accuracies(learner: Learner, vocab_size: int, length: int, count: int) -> dict[str, float]:
    """Share of right answers of each task, every answer given the right ones before it.

    The examples are those of the suite `longcontext`.
    """
    found, form = {}, TokenForm(vocab_size)
    for task in recall_tasks.names():
        examples = recall_tasks.make(task, form, length=length, count=count)
        right = learner.predict(examples.tokens)[:, :-1] == examples.tokens[:, 1:]
        found[task] = float(right[examples.answers[:, 1:] > 0].mean())
    return found


def circuits(learner: Learner, vocab_size: int) -> dict[str, list[float]] | None:
    """Attention of each layer's best head to two places, on tokens that are repeated once.

    `previous` is the token before the query. `induction` is the token after the query's earlier
    place, of which the next token is a copy (arXiv 2209.11895). 1 is all of the attention.
    """
    rows, length = REPEATS
    half = np.random.default_rng(SEED).integers(1, vocab_size, (rows, length // 2), np.int32)
    seen = learner.attention(np.concatenate([half, half], axis=1))
    if seen is None:
        return None
    queries = np.arange(length // 2, length)
    places = {"previous": queries - 1, "induction": queries - length // 2 + 1}
    return {
        name: [float(share) for share in seen[..., queries, keys].mean((1, 3)).max(1)]
        for name, keys in places.items()
    }
