"""The settings of training for early exits (LayerSkip, arXiv 2404.16710)."""

import dataclasses
from typing import Literal

from fusedkv_jax.validation import validate

DropoutCurriculum = Literal["constant", "exponential"]
Weights = Literal["cumulative", "uniform", "linear", "sqrt", "inverse"]
Curriculum = Literal["rotational", "gradual", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyExitConfig:
    """Layer dropout and the early-exit loss; both are off by default.

    With the loss on, "train/loss" is the weighted mean over all exits of a step; "eval/loss" stays
    that of the whole model. LayerSkip's recipe for training from scratch is `max_dropout` 0.2,
    `loss_scale` 1, `rotation` 4.

    Attributes:
      max_dropout: probability with which the last layer leaves a row's hidden states as they are.
        Layer l of L does so with max_dropout * (2^(l / (L-1)) - 1); what it caches is there
        nevertheless.
      dropout_curriculum: `constant`, or `exponential`: times 2^(t / (T-1)) - 1 at step t of T.
      loss_scale: scale of the lower layers' weights in the loss; 0 turns their losses off.
      weights: of layer l: `cumulative` 0 + 1 + ... + l, for the last one L-1 + loss_scale times
        the sum up to L-2; `uniform` 1; `linear` l+1; `sqrt` (l+1)^0.5; `inverse` 1/(l+1).
        The weights of a step's enabled layers are divided by their sum.
      curriculum: which layers below the last have a loss at step t: `rotational` every
        `rotation`-th, shifted by one from step to step; `gradual` layer l from
        t = T/2 * (L-l)/L on; `none` all of them.
      rotation: period of the rotational curriculum.
    """

    max_dropout: float = 0.0
    dropout_curriculum: DropoutCurriculum = "constant"
    loss_scale: float = 0.0
    weights: Weights = "cumulative"
    curriculum: Curriculum = "rotational"
    rotation: int = 4

    def __post_init__(self) -> None:
        least = {"max_dropout": 0, "loss_scale": 0, "rotation": 1}
        validate(self, ValueError, least=least, prefix="early_exit.")
        if self.max_dropout >= 1:
            raise ValueError(f"early_exit.max_dropout={self.max_dropout}; use a number below 1")
