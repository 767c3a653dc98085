"""The study of the recall recipe: an independent model, what is measured of it, and the report."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.study.recall import probes, questions, report, worker
from experiments.study.recall.cells import Cell
from experiments.study.retrieval import candidates, confirmation
from fusedkv_jax import layouts
from fusedkv_jax.data import make_train_iterator, recall_tasks
from fusedkv_jax.data.recall_forms import TokenForm
from fusedkv_jax.layouts import KINDS
from fusedkv_jax.model.mixing import recursion
from tests.experiments import commands

torch = pytest.importorskip("torch", reason="needs the extra reference")

from experiments.study.recall import frameworks, torch_model  # noqa: E402

TOY = {"seq_len": 64, "batch_size": 2, "steps": 4, "warmup": 2}


@pytest.mark.parametrize(
    ("layout", "shared"),
    [
        ("mha", 1),
        ("fusedkv", 1),
        ("mha", 2),
        ("fusedkv:value_sources=0", 1),
        ("fusedkv:granularity=head", 1),
        ("0_k0v1s8_2_f1+2", 1),
    ],
)
def test_both_frameworks_take_the_same_steps(layout, shared):
    cell = Cell(layout=layout, seed=0, queries_per_kv_head=shared, **TOY)
    config = cell.config()
    ours, independent = frameworks.JaxLearner(cell), frameworks.TorchLearner(cell)
    start = dict(_named(config, ours.state.params))
    independent.model.load_state_dict({name: torch.tensor(x) for name, x in start.items()})
    batches = make_train_iterator(config.data)
    for step in range(3):  # layer 1 exits in the second, layer 2 in the third
        batch = next(batches)
        expected, found = ours.step(batch, step), independent.step(batch, step)
        assert found == pytest.approx(expected, rel=1e-5)
        # Norms of arrays: Adam makes noise of a gradient that is nearly zero as large as any
        # other, and what it has moved is in the gradients that follow.
        moments = dict(_named(config, ours.moments()))
        for name, parameter in independent.model.named_parameters():
            moment = independent.trainer.optimizer.moments[parameter][0].numpy()
            assert _norm(moment - moments[name]) <= (2e-4 if step else 1e-5) * _norm(moment), name
    params = dict(_named(config, ours.state.params))
    for name, parameter in independent.model.named_parameters():
        apart = _norm(parameter.detach().numpy() - params[name])
        assert apart <= 5e-4 * _norm(params[name] - start[name]), name


def _norm(array):
    return np.linalg.norm(array.ravel())


def _named(config, params):
    return frameworks.in_torch_names(config.model, params)


@pytest.mark.parametrize(
    "name",
    sorted(
        {cell.layout for cell in questions.cells()}
        | {row.layout for rows in (candidates.ROWS, confirmation.ROWS) for row in rows.values()}
    ),
)
def test_layouts_are_those_of_the_library(name):
    for depth in (name.count("_") + 1,) if name[0].isdigit() else (4, 6, 8):
        layers = layouts.resolve(name, depth).layers
        for i, (layer, found) in enumerate(
            zip(layers, torch_model.reads(name, depth), strict=True)
        ):
            for kind, sources in zip(KINDS, (found.keys, found.values), strict=True):
                stream = layer.stream(kind)
                assert sources == (stream.sources or (i,))
                granularity = "head" if found.by_head else "channel"
                assert stream.weights == (granularity if found.fused else None)
                assert found.window == layer.window


@pytest.mark.parametrize(("kind", "fresh"), [("key", -1), ("value", 0)])
def test_fusion_weights_begin_as_in_the_library(kind, fresh):
    found = [torch.empty(2, 2, 8) for _ in range(3)]
    torch_model.draw_recursively(found, fresh, torch.Generator().manual_seed(3))
    draws = torch.randn(3, 2, 2, 8, generator=torch.Generator().manual_seed(3))
    anchor = layouts.get("fusedkv", 6).layers[-1].stream(kind).mixing.anchor
    expected = recursion(jnp.asarray(draws), anchor)
    np.testing.assert_allclose(torch.stack(found), expected, rtol=1e-6)


class Known:
    """Answers right up to a place, and attends to a place before each query."""

    def __init__(self, distance, until=10**6):
        self.distance, self.until = distance, until

    def predict(self, tokens):
        after = np.roll(tokens, -1, axis=1)
        after[:, self.until :] = -1
        return after

    def attention(self, tokens):
        shares = np.zeros((2, len(tokens), 2, tokens.shape[1], tokens.shape[1]))
        places = np.arange(self.distance, tokens.shape[1])
        shares[1, :, 0, places, places - self.distance] = 0.75
        return shares


def test_accuracy_is_the_share_of_right_answers():
    assert set(probes.accuracies(Known(1), 258, 64, 2).values()) == {1.0}
    examples = recall_tasks.make("multi_needle", TokenForm(258), length=64, count=2)
    half = int(np.flatnonzero(examples.answers[0])[4]) - 1
    assert probes.accuracies(Known(1, until=half), 258, 64, 2)["multi_needle"] == 0.5


def test_a_window_hides_what_is_older():
    q, k = torch.randn(2, 1, 9, 2, 4, generator=torch.Generator().manual_seed(0))
    seen = torch_model.attention_weights(q, k, 3) > 0
    ahead = np.arange(9) - np.arange(9)[:, None]
    np.testing.assert_array_equal(seen[0, 0], (ahead <= 0) & (ahead > -3))


def test_circuits_are_found_where_they_are():
    half = probes.REPEATS[1] // 2
    assert probes.circuits(Known(1), 258) == {"previous": [0, 0.75], "induction": [0, 0]}
    assert probes.circuits(Known(half - 1), 258) == {"previous": [0, 0], "induction": [0, 0.75]}


def test_layouts_that_are_none_are_refused():
    for layout, message in (("mah", "use fusedkv"), ("0_1_2_x", "'x' is no layer")):
        with pytest.raises(ValueError, match=message):
            torch_model.reads(layout, 4)


def test_a_run_is_recorded_and_can_be_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "EXAMPLES", {"curve": 1, "final": 1})
    cell = Cell(layout="fusedkv_lite", seed=0, **TOY)
    worker.work([cell], tmp_path / "records", tmp_path / "claims")
    (record,) = worker.read_all(tmp_path / "records")
    assert Cell.from_dict(record["cell"]) == cell
    assert [look["step"] for look in record["curve"]] == [1, 2, 3, 4]
    assert set(record["final"]) == set(recall_tasks.names())
    assert worker.check(tmp_path / "records", cell.name) is None
    record["curve"][0]["loss"] += 1
    worker.write(tmp_path / "records" / f"{cell.name}.json", record)
    assert "recorded" in worker.check(tmp_path / "records", cell.name)
    with pytest.raises(ValueError, match="there is no such record"):
        worker.check(tmp_path / "records", "mha")


def test_names_tell_all_cells_apart():
    cells = list(questions.cells())
    assert len({cell.name for cell in cells}) == len(cells)


def test_the_report_groups_seeds_and_says_when_they_learned(tmp_path):
    cells = questions.QUESTIONS[0].cells
    like = [c for c in cells if dataclasses.replace(c, seed=cells[0].seed) == cells[0]]
    for cell, final in zip(like, (0.25, 0.75, 0.95), strict=False):
        look = {"loss": 1.0, "previous": [0.5, 0.1], "induction": [0.0, 0.3]}
        curve = [
            {"step": 100, "accuracy": {"a": 0.0}, **look},
            {"step": 200, "accuracy": {"a": final}, **look},
        ]
        record = {"version": worker.VERSION, "study": "recall", "cell": dataclasses.asdict(cell)}
        record |= {"curve": curve, "final": {"a": final}, "seconds": 1.0, "environment": {}}
        worker.write(tmp_path / "records" / f"{cell.name}.json", record)
    text = report.write(tmp_path / "records", tmp_path)
    row = next(line for line in text.splitlines() if line.startswith(f"| {cells[0].layout} |"))
    planned = len(cells)
    assert f"{len(like[:3])} of {planned} planned runs are there." in text and planned > 3
    assert "64 examples of each, every answer" in text and "looks, at 16 examples of each" in text
    assert "| 0.250 to " in row and "| 0.50 0.10 | 0.00 0.30 |" in row
    assert (
        f"| {len(like[:3]) - 1} of {len(like[:3])} | {', '.join(['200'] * (len(like[:3]) - 1))} |"
        in row
    )
    assert (tmp_path / "curves.png").stat().st_size > 1000
    (tmp_path / "records" / "other.json").write_text(json.dumps({"study": "scaling"}))
    with pytest.raises(ValueError, match="no record of --study=recall"):
        report.write(tmp_path / "records", tmp_path)


def test_mistakes():
    for line, message in (
        (["--data=x"], "--data has no effect with --study=recall"),
        (["--questions=rats"], "did you mean rate"),
        (["--report", "--output=/nonexistent"], "holds no records"),
    ):
        with pytest.raises(commands.Refused, match=message):
            commands.run_here("reproduce", ["--study=recall", *line])
