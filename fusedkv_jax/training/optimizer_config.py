"""The settings of the optimizer."""

import dataclasses

from fusedkv_jax.validation import validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, with the settings of the FusedKV paper (arXiv 2512.03870) as defaults.

    Attributes:
      learning_rate: the peak, reached at the end of the warm-up.
      warmup_steps: updates of linear warm-up; a run shorter than twice this warms up for half
        of its steps, so that short trials need no second setting.
      final_fraction: the last update's learning rate, as a fraction of the peak.
      beta1, beta2, eps: Adam's moments and denominator.
      weight_decay: decoupled decay of matrices and embeddings (not of norms, biases and fusion
        weights).
      clip_norm: gradients with a larger global norm are scaled down to this norm.
      skip_spikes: a step whose loss or gradient norm is above the mean of the last 128 by more
        standard deviations than this changes nothing; 0 turns the rule off, 6 is usual.
      offload: keep the optimizer's state in the host's memory; each step brings it to the
        device for the update.
    """

    learning_rate: float = 3e-4
    warmup_steps: int = 2000
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    skip_spikes: float = 0.0
    offload: bool = False

    def __post_init__(self) -> None:
        validate(
            self,
            ValueError,
            least=dict.fromkeys(
                ("warmup_steps", "final_fraction", "beta1", "beta2", "weight_decay", "skip_spikes"),
                0,
            ),
            most={"final_fraction": 1},
            above=dict.fromkeys(("learning_rate", "eps", "clip_norm"), 0),
            prefix="optimizer.",
        )
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)}; use a number below 1")
