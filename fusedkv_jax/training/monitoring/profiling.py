"""A profiler trace of a few steps."""

import pathlib

import jax
from jaxtyping import PyTree

from fusedkv_jax import processes


class ProfileWindow:
    """Traces the steps `first` to `last` of process 0, for TensorBoard or Perfetto.

    Of a run that goes on between them, those that are left.

    Args:
      directory: where the trace goes.
      steps: first and last step, counted from 1; None traces nothing.
      total: steps of the run.

    Raises:
      ValueError: the steps are no range, or the run ends before them.
    """

    def __init__(self, directory: pathlib.Path, steps: tuple[int, int] | None, total: int) -> None:
        if steps is not None:
            text = f"profile_steps={steps[0]}:{steps[1]}"
            if not 1 <= steps[0] <= steps[1]:
                raise ValueError(f"{text}; use 1 <= first <= last")
            if steps[0] > total:
                raise ValueError(f"{text}, and the run has {total} steps; use some of them")
        self._directory, self._steps = directory, steps if processes.is_first() else None
        self._active = False

    def move(self, step: int, pending: PyTree) -> None:
        """Start or end the trace where it is time; a call that is not the time costs nothing.

        Args:
          step: steps done so far.
          pending: arrays of the last step, waited for before the trace starts or ends.
        """
        if self._steps is None:
            return
        if self._active and step >= self._steps[1]:
            jax.block_until_ready(pending)
            self.end()
        elif not self._active and self._steps[0] - 1 <= step < self._steps[1]:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(str(self._directory))
            self._active = True

    def end(self) -> None:
        """End the trace if there is one: no step follows."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
