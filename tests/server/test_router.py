"""Two replicas behind vllm-router, which our KV events tell where prefixes lie.

Needs the program `vllm-router` on the PATH (`pip install vllm-router`, in any environment).
"""

import concurrent.futures
import contextlib
import random
import shutil
import socket
import subprocess
import time

import httpx2 as httpx
import pytest

from tests.server.replica import PAGE, started
from tests.server.test_kv_events import free_address

pytest.importorskip("zmq")
ROUTER = shutil.which("vllm-router")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ROUTER is None, reason="vllm-router is not installed"),
]
PREFIX, CLIENTS = 20 * PAGE, 6


@contextlib.contextmanager
def routed(replicas):
    """The URL of a router before these: (url, where its events are)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [ROUTER, "--host=127.0.0.1", f"--port={port}", "--policy=kv_aware"]
    command += ["--kv-event-model=toy", f"--kv-event-block-size={PAGE}"]
    command += ["--health-check-interval-secs=2", "--worker-urls", *(url for url, _ in replicas)]
    for url, events in replicas:
        command += ["--kv-event-source", f"{url}={events}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                assert process.poll() is None
                time.sleep(0.2)
            yield url
        finally:
            process.kill()


def conversations(count, seed):
    """Prompts with one of five beginnings."""
    draw = random.Random(seed)
    prefixes = [draw.choices(range(60, 120), k=PREFIX) for _ in range(5)]
    return [draw.choice(prefixes) + draw.choices(range(60, 120), k=20) for _ in range(count)]


def ask(url, prompts, after=None, key=None):
    """(status, cached tokens) of each; `after(n)` is called when n have been answered.

    A prompt is token ids, or the messages of a conversation.
    """
    done, headers = [], {} if key is None else {"Authorization": f"Bearer {key}"}

    def one(prompt):
        body = {"model": "toy", "max_tokens": 2, "temperature": 0}
        chat = isinstance(prompt[0], dict)
        body["messages" if chat else "prompt"] = prompt
        try:
            answer = client.post(f"{url}/v1/{'chat/' * chat}completions", json=body)
            status = answer.status_code
        except httpx.HTTPError:
            status = 0
        usage = answer.json()["usage"] if status == 200 else {}
        done.append((status, usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)))
        if after is not None:
            after(len(done))

    with httpx.Client(timeout=300, headers=headers) as client:
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(one, prompts))
    return done


def count(url, name, key=None):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    lines = httpx.get(f"{url}/metrics", headers=headers).text.splitlines()
    return float(next(line for line in lines if line.startswith(f"vllm:{name}{{")).split()[-1])


def test_replicas_keep_the_hits_of_one_and_outlive_a_worker():
    addresses = [free_address() for _ in range(2)]
    configs = [f'{{"endpoint": "{address}"}}' for address in addresses]
    with (
        started(*configs, "") as ((first, one), (_, two), (_, alone)),
        routed(list(zip((one, two), addresses, strict=True))) as router,
    ):
        prompts = conversations(100, seed=0)
        single, several = ask(alone, prompts), ask(router, prompts)
        assert {status for status, _ in single + several} == {200}
        hits = [sum(cached for _, cached in found) for found in (single, several)]
        print(f"hits of {sum(map(len, prompts))} tokens: one replica {hits[0]}, two {hits[1]}")
        assert hits[1] >= 0.9 * hits[0] > 0.5 * PREFIX * len(prompts)
        shares = [count(url, "prompt_tokens_total") for url in (one, two)]
        print(f"prompt tokens of each replica: {shares}")
        assert min(shares) > 0.2 * sum(shares)

        prompts = conversations(100, seed=1)
        found = ask(router, prompts, lambda done: first.kill() if done == 30 else None)
        failed = [number for number, (status, _) in enumerate(found) if status != 200]
        print(f"a replica was killed after 30 of {len(found)} answers; failed: {failed}")
        assert len(failed) <= 0.05 * len(found)
        assert {status for status, _ in ask(router, prompts[:40])} == {200}


def as_messages(prompt):
    """Tokens of a prompt as letters: its beginning from the system, the rest from the user."""
    text = "".join(map(chr, prompt))
    pair = (("system", text[:PREFIX]), ("user", text[PREFIX:]))
    return [{"role": role, "content": content} for role, content in pair]


def test_conversations_of_clients_with_keys_find_their_prefixes():
    """The router passes the key on, and asks the replicas how they render conversations."""
    addresses = [free_address() for _ in range(2)]
    configs = [f'{{"endpoint": "{address}"}}' for address in addresses]
    with (
        started(*configs, "", keys=("first", "second")) as ((_, one), (_, two), (_, alone)),
        routed(list(zip((one, two), addresses, strict=True))) as router,
    ):
        for key in ("first", "second"):
            prompts = conversations(60, seed=0)
            if key == "second":  # the same words, whose pages another tenant has cached
                prompts = [as_messages(prompt) for prompt in prompts]
            before = [count(url, "prompt_tokens_total", key) for url in (one, two)]
            single, several = (ask(url, prompts, key=key) for url in (alone, router))
            assert {status for status, _ in single + several} == {200}
            hits = [sum(cached for _, cached in found) for found in (single, several)]
            shares = [count(url, "prompt_tokens_total", key) for url in (one, two)]
            shares = [after - then for after, then in zip(shares, before, strict=True)]
            print(f"{key}: hits {hits}, prompt tokens of each replica {shares}")
            assert hits[1] >= 0.85 * hits[0] > 0.5 * PREFIX * len(prompts)
            assert min(shares) > 0.2 * sum(shares)
        assert {status for status, _ in ask(router, prompts[:2])} == {401}
        assert {status for status, _ in ask(router, prompts[:2], key="third")} == {401}
