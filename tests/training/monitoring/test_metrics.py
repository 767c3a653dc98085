"""What the metric writers leave on disk, and the figures of the timer."""

import json
import math
import sys
import types

import pytest
from tensorboard.backend.event_processing import event_accumulator

from fusedkv_jax.training.monitoring import metrics
from fusedkv_jax.training.monitoring.metrics import (
    JsonLinesWriter,
    LineWriter,
    MultiWriter,
    StepTimer,
    TensorBoardWriter,
    WandbWriter,
    bits_per_byte,
    last_step,
)


def _records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_hold_every_value(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    writer.write(10, {"train/loss": 1.25, "train/grad_norm": math.inf})
    writer.write(20, {"eval/loss": math.nan})
    writer.close()
    first, second = _records(path)
    assert first.pop("time") > 1.7e9
    assert first == {"step": 10, "train/loss": 1.25, "train/grad_norm": None}
    assert (second["step"], second["eval/loss"]) == (20, None)


def test_json_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    for step in (10, 20, 30):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    writer = JsonLinesWriter(path, last_step=20)
    writer.write(30, {"loss": 31.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in _records(path)] == [(10, 10), (20, 20), (30, 31)]
    assert '"loss": 30.0' in (tmp_path / "metrics.replaced.jsonl").read_text()


@pytest.mark.parametrize(
    "content", [b"my notes\n", b'{"step": 5}\n', b"\xff\x00\n[]", b"[" * 10**5]
)
def test_a_file_of_another_origin_is_moved_not_lost(tmp_path, content):
    path, lines = tmp_path / "metrics.jsonl", []
    for _ in range(2):  # what was moved is not written over either
        path.write_bytes(content)
        assert last_step(path) == 0
        writer = JsonLinesWriter(path, report=lines.append)
        writer.write(1, {"loss": 2.0})
        writer.close()
    assert [record["loss"] for record in _records(path)] == [2.0]
    moved = (tmp_path / "metrics.replaced.jsonl").read_bytes()
    assert moved.count(content.removesuffix(b"\n")) == 2
    assert len(lines) == 2 * (b"\n" in content)


def test_tensorboard_reads_the_scalars_back(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(3, {"train/loss": 2.5})
    writer.write(4, {"train/loss": 2.25})
    writer.close()
    events = event_accumulator.EventAccumulator(
        str(tmp_path), size_guidance={event_accumulator.TENSORS: 0}
    ).Reload()
    found = [
        (event.step, float(event.tensor_proto.float_val[0]))
        for event in events.Tensors("train/loss")
    ]
    assert found == [(3, 2.5), (4, 2.25)]


def test_line_and_fan_out():
    lines = []
    writer = MultiWriter([LineWriter(lines.append, 100, lambda: "00:12")] * 2)
    writer.write(5, {"train/loss": 2.34567, "train/tokens_per_second": 12345.6, "eval/loss": 0.1})
    writer.close()
    wanted = "step 5/100  loss 2.346  tokens_per_second 12,346  eval loss 0.1  left 00:12"
    assert lines == [wanted, wanted]


class _Wandb(types.ModuleType):
    """What the writer uses of the package: runs by id, which know their scalars."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.settings = {}, []

    def init(self, **settings):
        self.settings.append(settings)
        run = self.runs.setdefault(settings["id"], types.SimpleNamespace(scalars={}, finished=0))
        run.log = lambda metrics, step: run.scalars.update({step: metrics})
        run.finish = lambda: setattr(run, "finished", run.finished + 1)
        return run


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tmp_path, monkeypatch):
    wandb = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (10, 20):
        writer = WandbWriter("project", "demo", {"train": {"steps": 20}}, tmp_path)
        writer.write(step, {"train/loss": float(step)})
        writer.close()
    (run,) = wandb.runs.values()
    assert run.scalars == {10: {"train/loss": 10.0}, 20: {"train/loss": 20.0}}
    assert run.finished == 2
    first, second = wandb.settings
    assert first == second
    assert (first["project"], first["resume"]) == ("project", "allow")
    assert first["config"] == {"train": {"steps": 20}}
    (tmp_path / "other").mkdir()
    WandbWriter("project", "demo", {}, tmp_path / "other")
    assert len(wandb.runs) == 2


def test_without_the_package_wandb_the_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb_project=p needs the package wandb; pip install"):
        WandbWriter("p", "demo", {}, tmp_path)


def test_a_writer_that_fails_is_reported_once_and_left_out():
    class Full:
        def write(self, step, metrics):
            raise OSError(28, "No space left on device")

        def close(self):
            raise AssertionError("it was left out")

    lines, reports = [], []
    line_writer = LineWriter(lines.append, 100, lambda: "?")
    writer = MultiWriter([Full(), line_writer], report=reports.append)
    for step in (1, 2):
        writer.write(step, {"train/loss": 1.0})
    writer.close()
    assert len(lines) == 2
    assert reports == ["warning: Full stops, training goes on: No space left on device"]


def test_timer_counts_tokens_waiting_and_utilisation(monkeypatch):
    clock = iter([100.0, 104.0, 200.0, 201.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    timer = StepTimer(tokens_per_step=50, flops_per_token=4e6, peak_flops=1e9)
    for waited in (0.25, 0.75):
        timer.count(waited)
    # 2 steps of 50 tokens in 4 seconds, one of which went into waiting.
    assert timer.report() == {"tokens_per_second": 25.0, "data_wait": 0.25, "mfu": 0.1}
    timer.restart()  # the 96 seconds in between do not count
    timer.count(0.0)
    assert timer.report()["tokens_per_second"] == 50.0


def test_utilisation_is_left_out_where_the_peak_is_unknown():
    timer = StepTimer(50, flops_per_token=4e6, peak_flops=None)
    timer.count(0.0)
    assert "mfu" not in timer.report()


def test_bits_per_byte():
    # A fair coin per bit: every byte costs 8 bits, whatever the tokens were.
    assert bits_per_byte(1000 * 8 * math.log(2), 1000) == pytest.approx(8.0)
