"""What clients may do to a server, and what it does then."""

import concurrent.futures
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import httpx2 as httpx
import pytest

from fusedkv_jax.server import ServerSettings, environment_keys, listen
from tests.server.fake import FakeEngine
from tests.server.running import Running, serving

JSON = {"Content-Type": "application/json"}
LONG = {"prompt": "a", "max_tokens": 4000}
ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
GOOD = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [65]},
}
WRONG = (
    *(-1, 10**30, 1.5, True, "x", "", [], [[]], {}, {"a": None}, [None], [1, "a"], [{}], [1.5]),
    *(["", ""], [-1], [2**40], "\ud800", {"role": "user"}, [{"role": 1, "content": "a"}]),
)
RAW = (
    *(b"", b"{", b"[]", b"null", b"1", b'"a"', b"\xff\xfe", b"{'a': 1}", b'{"prompt": NaN}', b"\0"),
    *(b"[" * 100_000, b'{"a":' * 20_000, b'{"prompt": "a", "temperature": 1e999}', b"{}"),
    *(b'{"prompt": "\\ud800"}', b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
)


def malformed() -> list[tuple[str, bytes]]:
    """Bodies that are no requests, and requests with one field that is wrong."""
    cases = [(route, body) for route in ROUTES for body in RAW]
    fields = {
        "/v1/completions": "prompt n temperature max_tokens stop logit_bias stream_options",
        "/v1/chat/completions": "messages seed tools tool_choice",
        "/tokenize": "messages",
        "/detokenize": "tokens",
    }
    for route, names in fields.items():
        for name in names.split():
            cases += [(route, json.dumps({**GOOD[route], name: value}).encode()) for value in WRONG]
    return cases


def test_malformed_bodies_are_refused_in_one_line(toy: Running):
    """Nothing that is malformed gets a 5xx, and what is refused says why."""
    statuses = []
    for route, body in malformed():
        response = toy.http.post(route, content=body, headers=JSON)
        statuses.append(response.status_code)
        assert response.status_code < 500 or response.status_code == 501, (route, body[:80])
        if response.status_code != 200:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert "Traceback" not in error["message"] and error["message"].count("\n") == 0
    # Some wrong values of one field are right ones of another: seed=-1 and the like.
    assert sum(400 <= status < 502 for status in statuses) > 200
    assert toy.http.post("/v1/completions", json=GOOD["/v1/completions"]).status_code == 200


@pytest.mark.parametrize(
    "method, route, status, advice",
    [
        ("POST", "/v1/embeddings", 404, "this server has /, /health,"),
        ("GET", "/nowhere", 404, "/v1/chat/completions"),
        ("GET", "/v1/completions", 405, "use POST"),
        ("DELETE", "/v1/models", 405, "use GET"),
        ("GET", "/v1/models/../../etc", 404, "/v1/models"),
    ],
)
def test_unknown_routes(toy, method, route, status, advice):
    response = toy.http.request(method, route)
    assert response.status_code == status and advice in response.json()["error"]["message"]


def test_bodies_are_json_and_bounded():
    with serving(FakeEngine(), max_body_bytes=1000) as running:
        body = json.dumps(GOOD["/v1/completions"])
        assert running.http.post("/v1/completions", content=body).status_code == 415
        body = {"prompt": "a" * 1000}
        assert running.http.post("/v1/completions", json=body).status_code == 413


def test_every_route_but_the_probes_wants_a_key():
    with serving(FakeEngine(), api_keys=["alice", "bob"]) as running:
        routes = [
            (route.path, method) for route in running.server.app.routes for method in route.methods
        ]
        for path, method in routes:
            for headers in (
                {},
                {"Authorization": "Bearer eve"},
                {"Authorization": "Basic ???"},
                {"Authorization": b"Basic \xe9"},
            ):
                status = running.http.request(method, path, headers=headers).status_code
                assert (status == 401) == (path not in ("/health", "/ready")), (path, method)
        assert running.http.get("/", auth=("anybody", "bob")).status_code == 200
        with running.sdk("alice") as client:
            assert client.models.list().data[0].id == "toy"


def test_keys_that_no_client_could_send_are_refused_unseen(monkeypatch):
    for keys in ("secret", ["a", ""], [" secret"], ["secret\n"], ["schlüssel"]):
        with pytest.raises(ValueError, match="API key|api_keys") as refused:
            ServerSettings(api_keys=keys)
        assert "secret" not in str(refused.value) and "schl" not in str(refused.value)
    ServerSettings(api_keys=["a", "two words", "!~"])
    monkeypatch.delenv("FUSEDKV_API_KEY", raising=False)
    assert environment_keys() == []
    monkeypatch.setenv("FUSEDKV_API_KEY", "secret\n")  # as `echo secret > file` leaves it
    assert environment_keys() == ["secret"]
    monkeypatch.setenv("FUSEDKV_API_KEY", "\n")
    with pytest.raises(ValueError, match="is set and empty"):
        environment_keys()


def test_no_tenant_meets_the_pages_of_another():
    body = {"prompt": [5] * 64, "max_tokens": 1}

    def cached(key: str, **more) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        done = running.http.post("/v1/completions", json={**body, **more}, headers=headers).json()
        return done["usage"]["prompt_tokens_details"]["cached_tokens"]

    with serving(FakeEngine(), api_keys=["alice", "bob"]) as running:
        assert [cached("alice"), cached("alice"), cached("bob"), cached("bob")] == [0, 48, 0, 48]
        assert [cached("bob", cache_salt="s"), cached("bob", cache_salt="s")] == [0, 48]


def test_a_full_queue_says_when_to_come_back():
    engine = FakeEngine(max_num_seqs=2, queue=2, pause=0.001)
    with serving(engine) as running, concurrent.futures.ThreadPoolExecutor(12) as pool:
        body = {"prompt": "a", "max_tokens": 300}
        asked = [pool.submit(running.http.post, "/v1/completions", json=body) for _ in range(12)]
        done = [each.result() for each in asked]
        refused = [each for each in done if each.status_code == 503]
        assert refused and len(done) - len(refused) >= 4
        assert {each.headers["Retry-After"] for each in refused} == {"2"}
        # Nothing of a request stays if one of its prompts finds no place.
        first = pool.submit(running.http.post, "/v1/completions", json=body)
        while not engine.stats().running:
            time.sleep(0.001)
        body = {"prompt": ["a"] * 4, "max_tokens": 4000}
        assert running.http.post("/v1/completions", json=body).status_code == 503
        assert first.result().status_code == 200 and running.idle()


def test_more_prompts_than_can_ever_wait_are_refused_for_good():
    with serving(FakeEngine(max_num_seqs=1, queue=2)) as running:
        body = {"prompt": ["a"] * 4, "max_tokens": 1}
        response = running.http.post("/v1/completions", json=body)
        assert response.status_code == 400 and "Retry-After" not in response.headers
        error = response.json()["error"]
        assert error["param"] == "prompt" and "at most 3 can wait" in error["message"]
        body["prompt"].pop()
        assert running.http.post("/v1/completions", json=body).status_code == 200


def test_those_who_leave_hold_nothing():
    with serving(FakeEngine(max_num_seqs=4, queue=500, pause=0.002)) as running:
        streams = []
        for number in range(100):
            body = {**LONG, "stream": True, "n": 1 + number % 2}
            request = running.http.build_request("POST", "/v1/completions", json=body)
            streams.append(running.http.send(request, stream=True))
            if len(streams) == 20:  # connections that one client holds
                for stream in streams:
                    stream.close()
                streams = []
        assert running.idle()
        assert running.metric("num_requests_running") == 0
        assert running.metric("kv_cache_usage_perc") == 0
        start = time.monotonic()
        assert running.http.post("/v1/completions", json=GOOD["/v1/completions"]).status_code == 200
        assert time.monotonic() - start < 5


def test_gauges_return_to_zero_and_counters_add_up():
    draw = random.Random(0)
    engine = FakeEngine(max_num_seqs=4)
    with serving(engine) as running, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def ask(length: int) -> int:
            body = {"prompt": "a", "max_tokens": length}
            done = running.http.post("/v1/completions", json=body).json()
            return done["usage"]["completion_tokens"]

        lengths = [draw.randint(1, 30) for _ in range(100)]
        assert list(pool.map(ask, lengths)) == lengths
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert running.metric(gauge) == 0
        assert running.metric("generation_tokens_total") == sum(lengths)
        assert running.metric("prompt_tokens_total") == 200
        assert running.metric("time_to_first_token_seconds_count") == 100
        text = running.http.get("/metrics").text
        assert 'vllm:request_success_total{finished_reason="length",model_name="toy"} 100.0' in text


def test_a_failure_of_one_request_is_its_own():
    with serving(FakeEngine()) as running:
        running.engine.broken = True
        response = running.http.post("/v1/completions", json=LONG)
        assert (
            response.status_code == 500
            and response.json()["error"]["message"] == "the request has NaN"
        )
        text = running.http.post("/v1/completions", json={**LONG, "stream": True}).text
        events = [line.removeprefix("data: ") for line in text.split("\n\n")]
        assert (
            json.loads(events[-3])["error"]["message"] == "the request has NaN"
            and events[-2] == "[DONE]"
        )
        assert running.http.get("/health").status_code == 503
        running.engine.broken = False
        assert running.http.get("/health").status_code == 200
        assert running.http.post("/v1/completions", json=GOOD["/v1/completions"]).status_code == 200
        assert running.idle()


def test_health_finds_an_engine_that_hangs():
    with serving(FakeEngine(), health_timeout=0.2) as running:
        assert running.engine.stats().steps == 0
        assert running.http.get("/health").status_code == 200
        assert running.engine.stats().steps == 1  # a real token
        running.server.health._fresh = 0.0  # as if time had passed
        running.engine.hung = True
        assert running.http.get("/health").status_code == 503
        assert running.http.get("/ready").status_code == 200
        assert running.idle()  # the token that did not come is given up
        running.engine.hung = running.engine.alive = False
        assert running.http.get("/health").status_code == 503


def test_small_packets_do_not_wait_for_acknowledgements():
    """Headers and first token are two packets; with Nagle's algorithm the second waits 40 ms."""
    with listen("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname()):
        connection, _ = sock.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# One process imports, and forks for each server.
PROGRAM = """
import logging, os, sys
from fusedkv_jax.server import Server, listen, run
from tests.server.fake import FakeEngine
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
for seconds in sys.argv[1:]:
    if not os.fork():
        print(os.getpid(), flush=True)
        run(Server(FakeEngine(pause=0.002), None), listen("127.0.0.1", 0), float(seconds))
        sys.stdout.flush()
        os._exit(0)
    print("exit", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_the_end_waits_for_answers():
    """With 0 s the stream is told that it is aborted; with 30 s it ends as it would have."""
    command = [sys.executable, "-W", "ignore", "-u", "-c", PROGRAM, "0", "30"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for seconds, reason in ((0, "abort"), (30, "length")):
                lines = (process.stdout.readline() for _ in range(100))
                pid = int(next(lines))
                url = next(line for line in lines if "listening" in line).split()[-1]
                _end_while_streaming(pid, url, seconds, reason)
                assert "exit 0\n" in lines
        finally:
            process.kill()


def _end_while_streaming(pid: int, url: str, seconds: float, reason: str) -> None:
    body = {"prompt": "a", "max_tokens": 300, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(pid, signal.SIGTERM)
        if seconds:
            for _ in range(10):
                next(lines)
            refused = httpx.post(f"{url}/v1/completions", json=body)
            assert refused.status_code == 503 and "Retry-After" in refused.headers
            assert httpx.get(f"{url}/ready").status_code == 503
            assert httpx.get(f"{url}/health").status_code == 200
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == reason
