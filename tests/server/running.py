"""A server over a fake engine, on a port of this machine, in a thread of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import httpx2 as httpx
import openai
import uvicorn

from fusedkv_jax.data.chat import ChatTemplate
from fusedkv_jax.server import Server, ServerSettings
from fusedkv_jax.server.kv_events import KvEventPublisher
from tests.server.fake import FakeEngine

TEMPLATE = ChatTemplate(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if mood %}[{{ mood }}]{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Running:
    """A server that runs: its engine, where it is, and clients for it."""

    def __init__(self, server: Server, engine: FakeEngine, port: int):
        self.server, self.engine = server, engine
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def sdk(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def metric(self, name: str, **kwargs) -> float:
        """The value of a metric without labels of its own."""
        lines = self.http.get("/metrics", **kwargs).text.splitlines()
        return float(next(line for line in lines if line.startswith(f"vllm:{name}{{")).split()[-1])

    def idle(self) -> bool:
        """Whether the engine comes to have nothing to do, within some seconds."""
        for _ in range(500):
            stats = self.engine.stats()
            if not (stats.running or stats.waiting or len(self.server.running)):
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def serving(
    engine: FakeEngine,
    template: ChatTemplate | None = TEMPLATE,
    kv_events: KvEventPublisher | None = None,
    **settings,
):
    """A `Running` over this engine."""
    server = Server(engine, template, ServerSettings(log_interval=0, **settings), kv_events)
    config = uvicorn.Config(server.app, log_config=None, lifespan="on")
    runner = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [sock]})
        thread.start()
        while not runner.started and thread.is_alive():
            time.sleep(0.005)
        running = Running(server, engine, sock.getsockname()[1])
        try:
            with running.http:
                yield running
        finally:
            runner.should_exit = True
            thread.join()
