"""The settings of distillation from a teacher."""

import dataclasses

from fusedkv_jax.validation import validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Losses that compare the model with a teacher; all are off by default.

    A teacher is what a model was before its conversion to another layout, as a rule. With any of
    them on, "train/loss" is the weighted sum; "eval/loss" stays the cross-entropy of the text.

    Attributes:
      logits: weight of the divergence of the model's next-token distribution from the teacher's,
        KL(teacher | model) in nats per token (arXiv 1503.02531).
      hidden: weight of the squared distance of the hidden states after each layer from the
        teacher's, relative to the square of those, averaged over layers; the teacher has as many
        layers, and as wide ones.
      text: weight of the cross-entropy of the text itself, where another weight is not 0.
      temperature: divides the logits of both before `logits` compares them; the divergence is
        multiplied by its square, which keeps gradients the same size.
    """

    logits: float = 0.0
    hidden: float = 0.0
    text: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        validate(self, ValueError, prefix="distillation.")
        for name in ("logits", "hidden", "text"):
            if getattr(self, name) < 0:
                raise ValueError(f"distillation.{name}={getattr(self, name)}; use 0 or more")
        if self.temperature <= 0:
            raise ValueError(f"distillation.temperature={self.temperature}; use more than 0")
        if self.text and not self.is_on:
            raise ValueError(
                f"distillation.text={self.text} goes with distillation.logits or .hidden; "
                "set one of them, or leave it out"
            )

    @property
    def is_on(self) -> bool:
        """A teacher is needed."""
        return bool(self.logits or self.hidden)
