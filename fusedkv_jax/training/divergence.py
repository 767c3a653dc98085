"""Divergence: when a run whose loss is no longer finite ends, not skipping steps for ever."""

import math
from collections.abc import Callable

from fusedkv_jax.training.config import ExperimentConfig

# A step whose loss or gradient is not finite changes nothing, so one bad batch passes. After so
# many in a row it is the parameters, and no batch will do.
LIMIT = 100
# The last steps of a run have no successors to wait for.
LIMIT_AT_END = 3


class DivergedError(ValueError):
    """The loss or its gradient is not finite, and will not be again."""


class DivergenceCheck:
    """Counts the steps in a row whose loss or gradient was not finite.

    Args:
      config: the experiment, for the message.
      newest_checkpoint: gives the newest checkpoint's step or None, for the message; all processes
        call it where one does.

    Attributes:
      in_a_row: how many there were up to now.
    """

    def __init__(
        self, config: ExperimentConfig, newest_checkpoint: Callable[[], int | None]
    ) -> None:
        self._config, self._newest = config, newest_checkpoint
        self.in_a_row = 0

    def count(self, step: int, loss: float, grad_norm: float) -> None:
        """Take the figures of the next step.

        Args:
          step: its number.
          loss, grad_norm: of it.

        Raises:
          DivergedError: it was the last one that the run waits for.
        """
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row >= LIMIT:
            raise self._error(step)

    def finish(self, step: int, evaluated: dict[str, float]) -> None:
        """Decide whether a run that ends has diverged.

        Args:
          step: the last one.
          evaluated: the metrics of an evaluation after it, or none.

        Raises:
          DivergedError: the evaluation or the last steps were not finite.
        """
        limit = max(1, min(LIMIT_AT_END, step // 2))
        held_out = evaluated.get("eval/loss", 0.0)
        if self.in_a_row >= limit or not math.isfinite(held_out):
            raise self._error(step)

    def _error(self, step: int) -> DivergedError:
        settings = self._config.optimizer
        what = (
            f"the loss or its gradient is not finite since step {step - self.in_a_row + 1}"
            if self.in_a_row
            else "the held-out loss is not finite"
        )
        newest = self._newest()
        kept = "there is no checkpoint" if newest is None else f"the newest checkpoint is {newest}"
        return DivergedError(
            f"training diverged: {what} (now {step}), and {kept}; lower optimizer.learning_rate="
            f"{settings.learning_rate:g} or raise optimizer.warmup_steps={settings.warmup_steps}, "
            "and run again, in another --workdir to start afresh"
        )
