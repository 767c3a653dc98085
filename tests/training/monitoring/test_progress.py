"""Progress lines: work outlives the terminal or pipe that it writes to."""

import os
import sys

from fusedkv_jax.training.monitoring.progress import Progress


def test_a_reader_that_has_gone_stops_the_lines_and_not_the_work(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    closed = open(writing, "w")
    monkeypatch.setattr(sys, "stdout", closed)
    with Progress(2) as progress:
        for _ in range(2):
            progress.print("a line")
            progress.advance()
    assert progress.done == 2
    monkeypatch.undo()
    try:
        closed.close()
    except BrokenPipeError:
        pass  # the line that was never read
