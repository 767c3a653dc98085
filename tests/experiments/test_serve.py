"""The program that serves: a mistake in its command is told before a model is read."""

import socket

from tests.experiments.commands import run


def test_mistakes_end_with_one_line(tmp_path):
    (tmp_path / "keys").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            (["--port=0"], "--workdir is missing"),
            ([f"--port={port}", "--workdir=x"], f"cannot listen on 127.0.0.1 port {port}"),
            ([f"--api_key_file={tmp_path / 'keys'}", "--workdir=x"], "there is no key in it"),
            (["--gpu_memory_utilization=2", "--workdir=x"], "gpu_memory_utilization=2.0"),
            (["--policy=none", "--workdir=x"], "policy"),
            (["--draft_tokens=2", "--workdir=x"], "--speculation"),
            (
                ["--speculation=ngram", "--prompt_lookup_max=1", "--workdir=x"],
                "prompt_lookup_max=1; use at least 2",
            ),
        ]
        found = run("serve", *(line for line, _ in cases))
    for (line, message), (code, _, error) in zip(cases, found, strict=True):
        assert code == 2 and message in error and error.count("\n") == 1, (line, error)
