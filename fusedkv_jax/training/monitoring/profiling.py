"""A profiler trace of a few steps."""

import pathlib

import jax
from jaxtyping import PyTree

from fusedkv_jax import processes


class ProfileWindow:
    """Traces the steps `first` to `last` of process 0, for TensorBoard or Perfetto.

    Args:
      directory: where the trace goes.
      steps: first and last step, counted from 1; None traces nothing.

    Raises:
      ValueError: the steps are no range.
    """

    def __init__(self, directory: pathlib.Path, steps: tuple[int, int] | None) -> None:
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"profile_steps={steps[0]}:{steps[1]}; use 1 <= first <= last")
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
        elif step == self._steps[0] - 1:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(str(self._directory))
            self._active = True

    def end(self) -> None:
        """End the trace if there is one: no step follows."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
