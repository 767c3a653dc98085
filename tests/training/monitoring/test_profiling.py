"""Which steps are traced."""

import jax

from fusedkv_jax.training.monitoring.profiling import ProfileWindow


def test_a_run_that_goes_on_among_the_steps_traces_those_that_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda place: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    for done, traced in ((0, [2, 3, 4, 5]), (3, [4, 5]), (4, [5]), (5, [])):
        window, events = ProfileWindow(tmp_path, (2, 5), total=9), []
        for step in range(done, 9):
            window.move(step, ())
            events.append(step + 1)
        inside = events[events.index("start") + 1 : events.index("stop")] if traced else []
        assert inside == traced, events
        assert events.count("start") == bool(traced)
