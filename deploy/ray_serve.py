"""Replicas of the server under Ray Serve: serve run deploy.ray_serve:app workdir=DIR

Ray starts a replica for each device, hands requests to the least loaded, and makes more or fewer of
them by how many requests they have. Each is the application that `experiments.serve` runs. Needs
`ray[serve]` beside the extra `serve`; deploy/ray_serve.yaml is a configuration for a cluster.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pydantic
from ray import serve


class Arguments(pydantic.BaseModel, extra="forbid"):
    """What `serve run` takes as NAME=VALUE, and the configuration file as `args`.

    Attributes:
        workdir, model: one of them, as for experiments.serve.
        name: what clients call the model; default its own.
        min_replicas, max_replicas: how many there may be.
        target_ongoing_requests: of each, that Ray aims at; about what a step holds.
        upscale_delay_s, downscale_delay_s: how long there must be too many requests, or too few,
            before a replica comes or goes; it loads and compiles the model when it comes.
        num_cpus: of each replica.
        resources: of each replica, such as {"TPU": 4}.
        engine: fields of ServingSettings.
    """

    workdir: str = ""
    model: str = ""
    name: str = ""
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: int = 32
    upscale_delay_s: float = 30
    downscale_delay_s: float = 600
    num_cpus: float = 1
    resources: dict[str, float] = {}
    engine: dict[str, Any] = {}


@serve.deployment(max_ongoing_requests=1024, health_check_timeout_s=60)
@serve.ingress()
class Replica:
    """One server and its engine."""

    def __init__(self, arguments: Arguments):
        from experiments.common import chat, models
        from fusedkv_jax import serving
        from fusedkv_jax.data import tokenizers
        from fusedkv_jax.data.chat import ChatError
        from fusedkv_jax.server import Server, ServerSettings, environment_keys

        if bool(arguments.workdir) == bool(arguments.model):
            raise ValueError("give either workdir=DIR or model=FOLDER")
        limits = ServerSettings(api_keys=environment_keys())
        if arguments.workdir:
            loaded = models.load_run(arguments.workdir, None)
        else:
            loaded = models.load_pretrained(arguments.model)
        tokenizer = tokenizers.load(loaded.config.data.tokenizer)
        settings = serving.ServingSettings(**arguments.engine)
        engine = serving.Engine(loaded.model, tokenizer, settings)
        engine.warm_up()
        name = arguments.name or loaded.config.name
        front = serving.AsyncEngine(engine, model_name=name)
        template = None
        with contextlib.suppress(ChatError):  # without one, conversations are refused
            template = chat.load_template(tokenizer, None)
        self.server = Server(front, template, limits)

    def __serve_build_asgi_app__(self):
        return self.server.app

    async def check_health(self) -> None:
        """Ray replaces a replica whose engine makes no tokens."""
        if not await self.server.health.alive():
            raise RuntimeError("the engine makes no tokens")


def app(arguments: Arguments) -> serve.Application:
    """For `serve run` and configuration files."""
    scaling = {
        "min_replicas": arguments.min_replicas,
        "max_replicas": arguments.max_replicas,
        "target_ongoing_requests": arguments.target_ongoing_requests,
        "upscale_delay_s": arguments.upscale_delay_s,
        "downscale_delay_s": arguments.downscale_delay_s,
    }
    options = {"num_cpus": arguments.num_cpus, "resources": arguments.resources}
    return Replica.options(autoscaling_config=scaling, ray_actor_options=options).bind(arguments)
