"""Training the decoder of `torch_model` as the recipe says, from the papers as well.

AdamW (arXiv 1711.05101) after clipping by the global norm, linear warm-up and a half cosine, and
the loss of LayerSkip's early exits (arXiv 2404.16710, equations 2 and 3, rotational curriculum).
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from experiments.study.recall.torch_model import Recall


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What training depends on besides model and data.

    Attributes:
      steps, warmup: updates in all, and those during which the rate rises.
      peak, final: the highest learning rate, and the last one as a fraction of it.
      decay: weight decay of matrices; norms and fusion weights have none.
      clip: largest norm of the gradients.
      exit_scale: of the lower layers' part in the loss; 0 leaves it out.
      rotation: a layer's exit is in the loss in every so manieth step.
    """

    steps: int
    warmup: int
    peak: float
    final: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.1
    clip: float = 1.0
    exit_scale: float = 1.0
    rotation: int = 4


def learning_rate(settings: Settings, step: int) -> float:
    """Of update 0 ... steps - 1; the last of the warm-up has the peak, the last of all the end."""
    done = step + 1
    if done <= settings.warmup:
        return settings.peak * done / settings.warmup
    share = (done - settings.warmup) / (settings.steps - settings.warmup)
    height = (1 + math.cos(math.pi * share)) / 2
    return settings.peak * (settings.final + (1 - settings.final) * height)


def exit_weights(settings: Settings, depth: int, step: int) -> list[float]:
    """Weight of each layer's loss at a step, summing to 1."""
    below = range(depth - 1)
    weights = [
        settings.exit_scale * sum(range(layer + 1)) * ((layer - step) % settings.rotation == 0)
        for layer in below
    ]
    weights.append(depth - 1 + settings.exit_scale * sum(below))
    return [weight / sum(weights) for weight in weights]


def document_sizes(batch: Mapping[str, np.ndarray]) -> list[int]:
    """Tokens of the documents of each row, all of one size in this data."""
    segments = np.asarray(batch["segment_ids"])
    sizes = (segments.shape[1] // segments.max(1)).tolist()
    expected = [np.arange(segments.shape[1]) // size + 1 for size in sizes]
    if not np.array_equal(segments, expected):
        raise ValueError("a row holds documents of several sizes; this model packs one size")
    return sizes


class AdamW:
    """Algorithm 2 of arXiv 1711.05101, with decay scaled by the learning rate alone.

    Attributes:
      moments: first and second moment of each parameter.
    """

    def __init__(self, decayed: list[Parameter], kept: list[Parameter], settings: Settings):
        self.settings, self.updates = settings, 0
        self.decays = {p: settings.decay for p in decayed} | {p: 0.0 for p in kept}
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in self.decays}

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """Change the parameters by their gradients."""
        self.updates += 1
        first, second = self.settings.betas
        # The moments begin at zero, for which these make up.
        mean_share, square_share = 1 - first**self.updates, 1 - second**self.updates
        for parameter, (mean, square) in self.moments.items():
            gradient = parameter.grad
            assert gradient is not None  # the loss depends on all of them
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            spread = square.div(square_share).sqrt_().add_(self.settings.eps)
            parameter.mul_(1 - rate * self.decays[parameter])
            parameter.addcdiv_(mean, spread, value=-rate / mean_share)


class Trainer:
    """A model with its optimizer; `step` is one update."""

    def __init__(self, model: Recall, settings: Settings):
        self.model, self.settings = model, settings
        self.optimizer = AdamW(model.decayed(), model.kept(), settings)

    def loss(self, batch: Mapping[str, np.ndarray], step: int) -> Tensor:
        """Mean over the targets that count, of the exits in the loss of this step."""
        tokens, targets = (torch.tensor(batch[name]).long() for name in ("tokens", "targets"))
        counted = torch.tensor(batch["loss_mask"]) != 0
        outputs = self.model(tokens, document_sizes(batch))
        weights = exit_weights(self.settings, len(outputs), step)
        losses = [
            weight
            * torch.nn.functional.cross_entropy(self.model.logits(x[counted]), targets[counted])
            for x, weight in zip(outputs, weights, strict=True)
            if weight
        ]
        return torch.stack(losses).sum()

    def step(self, batch: Mapping[str, np.ndarray], step: int) -> tuple[float, float]:
        """Update by a batch; gives the loss, and the norm of its gradients before clipping."""
        self.model.zero_grad()
        loss = self.loss(batch, step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.update(learning_rate(self.settings, step))
        return float(loss.detach()), float(norm)
