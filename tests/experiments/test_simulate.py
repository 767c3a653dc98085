"""The simulator from the command line, on a small trace of its own."""

import json

import pytest

from tests.experiments.commands import check_mistakes, run

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02d}.5,{200 + 40 * second},{10 + second}\n" for second in range(50)
)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def test_a_table_a_document_and_a_picture(trace, tmp_path):
    common = [f"--trace={trace}", "--preset=332m", "--layout=mha", "--layout=fusedkv"]
    lines = [
        [*common, "--load=0.5", "--load=0.9", f"--output_dir={tmp_path / 'one'}"],
        [*common, "--load=0.9", "--policy=fcfs", "--policy=mlfq", f"--output_dir={tmp_path}/two"],
        [*common, "--num_requests=5", "--async_scheduling", f"--output_dir={tmp_path}/three"],
    ]
    results = run("simulate", *lines)
    documents = []
    for (code, out, _), name in zip(results, ("one", "two", "three"), strict=True):
        assert code == 0
        documents.append(json.loads(out.splitlines()[-1]))
        folder = tmp_path / name
        assert json.loads((folder / "simulation.json").read_text()) == documents[-1]
        assert (folder / "simulation.md").read_text().strip() in out
        assert (folder / "simulation.png").stat().st_size > 10_000
    assert [d["settings"]["async_scheduling"] for d in documents] == [False, False, True]
    rows = documents[0]["rows"]
    assert [(row["layout"], row["load"]) for row in rows] == [
        ("mha", 0.5),
        ("mha", 0.9),
        ("fusedkv", 0.5),
        ("fusedkv", 0.9),
    ]
    assert all(row["requests"] == 50 for row in rows)
    pages = documents[0]["pages"]
    assert pages["fusedkv"] > 1.95 * pages["mha"]
    assert rows[2]["ttft"][0] < rows[0]["ttft"][0], "half of the prefill"
    again = documents[1]["rows"][0]  # the same cell gives the same figures
    assert again == rows[1]


def test_mistakes(trace, tmp_path):
    given = f"--trace={trace}"
    (tmp_path / "notes.txt").write_text("hello\n")
    check_mistakes(
        "simulate",
        [
            ([], "--trace"),
            ([f"--trace={tmp_path / 'none'}"], "none"),
            ([f"--trace={tmp_path / 'notes.txt'}"], "is not a trace"),
            ([given, "--policy=fifo"], "fifo"),
            ([given, "--layout=fusedkw"], "fusedkw"),
            ([given, "--layout=lckv"], "cyclic"),
            ([given, "--cache_dtype=int4"], "pages do not hold int4; use int8"),
            ([given, "--device=v5e:3x3"], "v5e:3x3"),
            ([given, f"--device={tmp_path / 'none.json'}"], "none.json"),
            ([given, "--preset=13b"], "13b"),
            ([given, "--load=0"], "--load=0"),
            ([given, "--page_size=0"], "page_size"),
            ([given, "--max_num_seqs=300", "--max_num_batched_tokens=100"], "300"),
        ],
    )


@pytest.mark.slow
def test_a_calibration_on_steps_of_the_real_engine(trace, tmp_path):
    common = ["--preset=demo", "--layout=fusedkv", "--max_num_seqs=2"]
    common += ["--max_num_batched_tokens=16"]
    options = [*common, "--max_model_len=64", "--steps=120", "--requests=6"]
    options += [f"--output_dir={tmp_path}"]
    ((code, out, err),) = run("calibrate", options)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["steps"] >= 120 and 0 < found["median_error"] < 1
    assert 0 < found["repeat_error"] < 1 and 0 < found["typical_error"] < 1
    assert "own repeats" in out and set(found["layouts"]) == {"fusedkv"}
    assert [(row["workload"], row["fitted_to"]) for row in found["served"]] == [
        (workload, which)
        for workload in ("chat", "summaries", "stories")
        for which in ("the log", "its steps")
    ]
    assert all(
        row[f"ttft_p50_{of}"] > 0 for row in found["served"] for of in ("simulated", "measured")
    )
    calibrated = [f"--trace={trace}", *common, f"--device={tmp_path / 'calibration.json'}"]
    calibrated += ["--num_requests=8", "--load=0.5", f"--output_dir={tmp_path}"]
    ((code, out, err),) = run("simulate", calibrated)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["device"]["median_error"] == found["median_error"]
