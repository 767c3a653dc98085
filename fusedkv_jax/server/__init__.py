"""An OpenAI server over a serving engine (the extra `serve`).

`Server(engine, template).app` is an ASGI application, for any host of such; `run` serves it with
uvicorn until it is told to end.
"""

from fusedkv_jax.server.access import environment_keys
from fusedkv_jax.server.app import Server, ServerSettings
from fusedkv_jax.server.run import listen, run

__all__ = ["Server", "ServerSettings", "environment_keys", "listen", "run"]
