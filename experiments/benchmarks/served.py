"""What load is put on: our engine, transformers, vLLM, and any server by its URL."""

import asyncio
import contextlib
import importlib.util
import itertools
import json
import os
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import torch_llama
from experiments.benchmarks.load import Ask, Serve
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation import SamplingParams
from fusedkv_jax.interop import save_huggingface
from fusedkv_jax.model import Decoder
from fusedkv_jax.serving import AsyncEngine, Engine, ServingSettings


@contextlib.asynccontextmanager
async def engine(model: Decoder, settings: ServingSettings) -> AsyncIterator[Serve]:
    """Our engine in this process, with everything compiled."""
    inner = Engine(model, settings=settings)
    inner.warm_up()
    front, numbers = AsyncEngine(inner), itertools.count()
    await front.start()

    async def serve(ask: Ask, came: Callable[[], None]) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=ask.max_tokens, ignore_eos=True)
        generated = 0
        async with front.add(ask.prompt, params, request_id=str(next(numbers))) as stream:
            async for delta in stream:
                if delta.error is not None:
                    raise RuntimeError(f"a request {delta.error}")
                came()
                generated += len(delta.token_ids)
        return generated

    try:
        yield serve
    finally:
        await front.stop()


@contextlib.asynccontextmanager
async def over_http(model: Decoder, settings: ServingSettings) -> AsyncIterator[Serve]:
    """Our server over an engine in this process, asked as any other is.

    Raises ValueError if the packages of the extra `serve` or httpx2 are missing.
    """
    missing = [name for name in ("starlette", "uvicorn") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"a server needs {', '.join(missing)}: pip install 'fusedkv_jax[serve]'")
    import uvicorn

    from fusedkv_jax.server import Server, ServerSettings

    inner = Engine(model, _Characters(), settings)
    inner.warm_up()
    app = Server(AsyncEngine(inner), None, ServerSettings(log_interval=0)).app
    runner = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        running = asyncio.create_task(asyncio.to_thread(runner.run, [sock]))
        try:
            while not (runner.started or running.done()):
                await asyncio.sleep(0.01)
            async with server(f"http://127.0.0.1:{sock.getsockname()[1]}") as serve:
                yield serve
        finally:
            runner.should_exit = True
            await running


class _Characters:
    """A tokenizer of any vocabulary: every token is a character."""

    eos_id = None

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))


@contextlib.asynccontextmanager
async def transformers(config: ModelConfig, settings: ServingSettings) -> AsyncIterator[Serve]:
    """`ContinuousBatchingManager` over a Llama of the same geometry, page size and budget."""
    import transformers as hf

    size = 16
    assert settings.num_pages is not None
    batching = hf.ContinuousBatchingConfig(
        page_size=size,
        num_blocks=settings.num_pages * settings.page_size // size,
        max_batch_tokens=settings.max_num_batched_tokens,
        max_requests_per_batch=settings.max_num_seqs,
    )
    greedy = hf.GenerationConfig(do_sample=False, eos_token_id=-1)
    model: Any = torch_llama.model(config)
    manager = model.eval().init_continuous_batching(greedy, batching)
    manager.start()
    numbers = itertools.count()

    async def serve(ask: Ask, came: Callable[[], None]) -> int:
        name, ready = str(next(numbers)), asyncio.Queue()
        manager.register_result_handler(name, ready.put_nowait)
        manager.add_request(ask.prompt, name, max_new_tokens=ask.max_tokens, streaming=True)
        while True:
            output = await ready.get()
            if output.error is not None:
                raise RuntimeError(f"transformers: {output.error}")
            came()
            if output.is_finished():
                return len(output.generated_tokens)

    try:
        yield serve
    finally:
        await asyncio.to_thread(manager.stop, timeout=60)


@contextlib.asynccontextmanager
async def vllm(python: str, model: Decoder, settings: ServingSettings) -> AsyncIterator[Serve]:
    """vLLM's server on the same weights, in fp32, with the same rows and tokens of a step.

    Args:
        python: of the environment that has vLLM; its command `vllm` is missing from some builds.
        model: of an architecture that transformers has.
        settings: of a step.

    Raises:
        ValueError: it ends before it serves; with the last line of its output.
    """
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as sock:
        port, log = sock.getsockname()[1], Path(folder) / "log"
        save_huggingface(model, Path(folder) / "model")
        sock.close()
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--skip-tokenizer-init"]
        command += [f"--model={folder}/model", "--dtype=float32", f"--port={port}"]
        command += [f"--max-num-seqs={settings.max_num_seqs}", "--host=127.0.0.1"]
        command += [f"--max-num-batched-tokens={settings.max_num_batched_tokens}"]
        # On CPUs it would leave one core to its server; ours shares all of them with the engine.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environment = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "1"}
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**environment, **os.environ}
            )
        try:
            while not await asyncio.to_thread(_answers, f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None:
                    last = log.read_text(errors="replace").strip().rpartition("\n")[2]
                    raise ValueError(f"--vllm={python}: vLLM has ended: {last}")
                await asyncio.sleep(1)
            async with server(f"http://127.0.0.1:{port}") as serve:
                yield serve
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False


@contextlib.asynccontextmanager
async def server(url: str) -> AsyncIterator[Serve]:
    """A server of the OpenAI API; tokens are counted by its own account of usage.

    It is asked without the package openai, which takes a millisecond to hand over a first token.
    The key is that of OPENAI_API_KEY. Raises ValueError for a server that does not answer.
    """
    if not importlib.util.find_spec("httpx2"):
        raise ValueError("--url needs the package httpx2: pip install httpx2")
    import httpx2

    async with httpx2.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1") + "/v1",
        headers={"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"},
        limits=httpx2.Limits(max_connections=None),
        timeout=3600,
    ) as client:
        try:
            listed = await client.get("/models")
            name = listed.raise_for_status().json()["data"][0]["id"]
        except (httpx2.HTTPError, ValueError, LookupError) as error:
            raise ValueError(f"--url={url}: no model is served there: {error}") from None

        async def serve(ask: Ask, came: Callable[[], None]) -> int:
            body = {
                "model": name,
                "prompt": ask.prompt,
                "max_tokens": ask.max_tokens,
                "temperature": 0.0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
            }
            generated = 0
            async with client.stream("POST", "/completions", json=body) as response:
                if response.is_error:
                    text = (await response.aread()).decode(errors="replace")
                    raise RuntimeError(f"{url} answered {response.status_code}: {text}")
                async for line in response.aiter_lines():
                    field, _, value = line.partition(":")
                    if field != "data" or value.strip() == "[DONE]":
                        continue
                    event = json.loads(value)
                    if "error" in event:
                        raise RuntimeError(f"{url} could not go on: {event['error']}")
                    if event["choices"]:
                        came()
                    if event.get("usage"):
                        generated = event["usage"]["completion_tokens"]
            return generated

        yield serve
