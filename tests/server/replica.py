"""A server over a real engine of a small model: here, or as a process of its own.

`python -m tests.server.replica [KV_EVENTS_CONFIG [KEY ...]]` prints its URL when it serves.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

from fusedkv_jax.data.tokenizers import ByteTokenizer
from fusedkv_jax.server import Server, ServerSettings, listen, run
from fusedkv_jax.server.kv_events import KvEventPublisher, KvEventsConfig
from fusedkv_jax.serving import AsyncEngine, Engine, ServingSettings, StepShapes
from tests.model import small
from tests.server.running import TEMPLATE

PAGE = 16
SHAPES = StepShapes(decode_rows=(16,), mixed_rows=(0, 16), chunk_rows=(20,), chunk=32)


def engine(**changes) -> Engine:
    """A model of bytes with one and the same random weights; nothing is compiled yet."""
    tokenizer = ByteTokenizer()
    config = small.config(
        "fusedkv",
        num_layers=4,
        d_model=16,
        d_ff=16,
        vocab_size=tokenizer.vocab_size,
        max_length=12_288,
    )
    settings = dict(
        max_num_seqs=16,
        max_num_batched_tokens=128,
        max_model_len=1024,
        page_size=PAGE,
        num_pages=640,
        shapes=SHAPES,
    )
    return Engine(small.decoder(config), tokenizer, ServingSettings(**{**settings, **changes}))


@contextlib.contextmanager
def started(
    *configs: str, keys: Sequence[str] = ()
) -> Iterator[list[tuple[subprocess.Popen, str]]]:
    """Replicas in processes of their own, one for each configuration of KV events ("": none)."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.server.replica"]
    with contextlib.ExitStack() as stack:
        processes = []
        for config in configs:
            line = [*command, config, *keys]
            process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield [(process, process.stdout.readline().strip()) for process in processes]


def main() -> None:
    sock = listen("127.0.0.1", 0)
    served = engine()
    served.warm_up()
    config, *keys = sys.argv[1:] or [""]
    events = KvEventPublisher(KvEventsConfig.decode(config)) if config else None
    settings = ServerSettings(api_keys=keys, log_interval=0)
    front = AsyncEngine(
        served, model_name="toy", on_changes=None if events is None else events.publish
    )
    print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    run(Server(front, TEMPLATE, settings, events), sock, 5)


if __name__ == "__main__":
    main()
