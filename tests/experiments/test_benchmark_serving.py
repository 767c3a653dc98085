"""Load on servers: what the figures mean, and the suite against our engine and over HTTP."""

import asyncio
import json
import pathlib
import sys

import pytest

from experiments.benchmarks import load, served, serving, torch_llama
from tests.server import running
from tests.server.fake import FakeEngine


class Jumping(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer: nothing waits, and nothing is late."""

    now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready and self._scheduled:
            self.now = self._scheduled[0].when()
        super()._run_once()


def _run(coroutine):
    with asyncio.Runner(loop_factory=Jumping) as runner:
        return runner.run(coroutine)


async def _slow(ask, came):
    """A second to the first token, half a second for each further one."""
    await asyncio.sleep(0.5)
    for _ in range(ask.max_tokens):
        await asyncio.sleep(0.5)
        came()
    return ask.max_tokens


def _asks(*generated):
    return [load.Ask([1] * 10, count) for count in generated]


def test_clients_of_a_closed_loop_wait_for_their_answers():
    answers = _run(load.closed_loop(_slow, _asks(3, 3, 3, 3), 2))
    assert sorted(answer.start for answer in answers) == [0, 0, 2, 2]
    row = load.figures(answers)
    assert row["requests/s"] == 1.0
    assert (row["output tokens/s"], row["tokens/s"]) == (3.0, 13.0)
    assert {row[f"TTFT p{p} ms"] for p in (50, 99)} == {1000.0}
    assert row["TPOT p50 ms"] == row["ITL p99 ms"] == 500.0


def test_arrivals_do_not_wait_and_end_at_n_over_the_rate():
    answers = _run(load.open_loop(_slow, _asks(*[40] * 50), rate=5.0, seed=3))
    starts = sorted(answer.start for answer in answers)
    assert starts[-1] == pytest.approx(10.0) and starts[0] < 1.0
    gaps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert max(gaps) > 3 * sorted(gaps)[25], "exponential, not even"
    assert starts[-1] - starts[0] < answers[0].latency


def test_goodput_counts_answers_that_keep_both_objectives():
    answers = _run(load.closed_loop(_slow, _asks(1, 3), 2))
    for objectives, good in (((1.0, 0.5), 2), ((1.0, 0.4), 1), ((0.9, 0.5), 0)):
        row = load.figures(answers, load.Objectives(*objectives))
        assert row["goodput/s"] == good / 2.0
    assert answers[0].tpot is None and load.figures(answers[:1])["TPOT p50 ms"] == 0.0


def test_our_engine_under_load(monkeypatch):
    monkeypatch.setattr(torch_llama, "missing", lambda: "torch is not installed")
    chosen = serving.sizes(quick=True)
    found = serving.measure_closed_loops(chosen, 1, serving.Others())
    assert [(row["server"], row["clients"]) for row in found.rows] == [
        ("fusedkv_jax", 1),
        ("fusedkv_jax", 2),
    ]
    for row in found.rows:
        assert 0 < row["TTFT p50 ms"] and 0 < row["output tokens/s"] < row["tokens/s"]
    assert found.targets == []


def test_any_server_by_its_url():
    with running.serving(FakeEngine()) as server:
        measurements = serving.measurements(
            quick=True, rounds=1, torch_compile=False, others=serving.Others(url=server.url)
        )
        assert list(measurements) == ["closed_loops", "poisson"]
        found = measurements["poisson"]()
    (row,) = found.rows
    assert row["server"] == server.url and row["goodput/s"] == row["requests/s"] > 0


def _ask_once(url, tokens):
    """The tokens of an answer, and how often something of it has come."""

    async def ask():
        came = []
        async with served.server(url) as serve:
            return await serve(load.Ask([1] * 10, tokens), lambda: came.append(1)), len(came)

    return asyncio.run(ask())


def test_tokens_are_counted_by_usage_and_pieces_by_events():
    """Two of the nine bytes of its text begin a character: nothing of them comes."""
    with running.serving(FakeEngine()) as server:
        assert _ask_once(server.url, 9) == (9, len("Grüße, "))


def test_what_a_server_refuses_or_cannot_end_is_an_error(monkeypatch):
    with running.serving(FakeEngine(max_num_seqs=0, queue=0)) as full:
        with pytest.raises(RuntimeError, match="answered 503: .*the queue is full"):
            _ask_once(full.url, 9)
    with running.serving(FakeEngine()) as broken:
        broken.engine.broken = True
        with pytest.raises(RuntimeError, match="could not go on: .*has NaN"):
            _ask_once(broken.url, 9)
    with running.serving(FakeEngine(), api_keys=["secret"]) as closed:
        with pytest.raises(ValueError, match="no model is served there: .*401"):
            _ask_once(closed.url, 9)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert _ask_once(closed.url, 2) == (2, 2)


def test_a_url_where_nothing_is_served():
    measure = serving.measurements(
        quick=True, rounds=1, torch_compile=False, others=serving.Others(url="http://127.0.0.1:9")
    )["closed_loops"]
    with pytest.raises(ValueError, match="--url=http://127.0.0.1:9: no model is served there"):
        measure()


AS_VLLM = """#!{python}
import json, pathlib, sys
sys.path.insert(0, {root!r})
options = dict(each.removeprefix("--").split("=", 1) for each in sys.argv[4:])
assert sys.argv[1:4] == ["-m", "vllm.entrypoints.openai.api_server", "--skip-tokenizer-init"]
model = pathlib.Path(options.pop("model"), "config.json")
options["layers"] = json.loads(model.read_text())["num_hidden_layers"]
pathlib.Path({seen!r}).write_text(json.dumps(options))
from fusedkv_jax.server import Server, ServerSettings, listen, run
from tests.server.fake import FakeEngine
settings = ServerSettings(log_interval=0)
run(Server(FakeEngine(), None, settings), listen(options["host"], int(options["port"])), 1)
"""


def _program(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return serving.Others(vllm=str(path))


def test_vllm_beside_our_server(monkeypatch, tmp_path):
    """It is asked as our server is; here by something else that takes the same options."""
    monkeypatch.setattr(torch_llama, "missing", lambda: "torch is not installed")
    seen, root = tmp_path / "seen", pathlib.Path(__file__).parents[2]
    text = AS_VLLM.format(python=sys.executable, root=str(root), seen=str(seen))
    chosen = serving.sizes(quick=True)
    found = serving.measure_closed_loops(chosen, 1, _program(tmp_path / "python", text))
    names = ["fusedkv_jax", "fusedkv_jax, HTTP", "vllm, HTTP"]
    assert [(row["clients"], row["server"]) for row in found.rows] == [
        (clients, name) for clients in (1, 2) for name in names
    ]
    assert all(row["output tokens/s"] > 0 for row in found.rows)
    options = json.loads(seen.read_text())
    expected = {"dtype": "float32", "max-num-seqs": "2", "max-num-batched-tokens": "16"}
    assert expected.items() <= options.items()
    assert options["layers"] == chosen.config.num_layers


def test_a_vllm_that_does_not_start(monkeypatch, tmp_path):
    monkeypatch.setattr(torch_llama, "missing", lambda: "torch is not installed")
    others = _program(tmp_path / "python", "#!/bin/sh\necho no module named vllm\nexit 1\n")
    with pytest.raises(ValueError, match="vLLM has ended: no module named vllm"):
        serving.measure_closed_loops(serving.sizes(quick=True), 1, others)
