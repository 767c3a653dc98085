"""PyTorch's attention on the same shapes, in a process of its own: both libraries want the GPU.

python -m experiments.benchmarks.kernels_torch '{"batch": 1, ...}' ROUNDS COMPILED
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.report import Measurement


def measure(shape: Any, *, compiled: bool, rounds: int) -> Measurement:
    """Scaled-dot-product and flex attention, plain and on rebuilt keys and values."""
    title = "PyTorch: causal forward, bfloat16"
    command = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(shape))]
    command += [str(rounds), str(int(compiled))]
    # jax takes most of the GPU's memory beforehand unless told otherwise.
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        return Measurement(title, skipped=(done.stderr.strip().splitlines() or ["failed"])[-1])
    rows = json.loads(done.stdout.splitlines()[-1])
    return Measurement(title, dataclasses.asdict(shape), rows)


def _main(sizes: dict[str, int], rounds: int, compiled: bool) -> None:
    try:
        import torch
        from torch.nn.attention import flex_attention as flex
    except ImportError as error:
        sys.exit(f"PyTorch is not installed: {error}")
    if not torch.cuda.is_available():
        sys.exit("PyTorch has no CUDA here")
    batch, heads, kv_heads = sizes["batch"], sizes["heads"], sizes["kv_heads"]
    draw = lambda n, length: torch.randn(  # noqa: E731
        batch, n, length, sizes["size"], device="cuda", dtype=torch.bfloat16
    )
    q = draw(heads, sizes["queries"])
    sources = [draw(kv_heads, sizes["keys"]) for _ in range(4)]
    weights = [torch.randn(kv_heads, 1, sizes["size"], device="cuda") for _ in range(4)]

    def mixed(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * x.float() + b * y.float()).to(x.dtype)

    def rebuilt(attend: Callable[..., Any]) -> torch.Tensor:
        key = mixed(*sources[:2], *weights[:2])
        return attend(key, mixed(*sources[2:], *weights[2:]))

    def sdpa(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, key, value, is_causal=True, enable_gqa=True
        )

    mask = flex.create_block_mask(
        lambda b, h, i, j: i >= j, None, None, sizes["queries"], sizes["keys"], device="cuda"
    )
    call = torch.compile(flex.flex_attention) if compiled else flex.flex_attention

    def flexible(key: torch.Tensor, value: torch.Tensor) -> Any:
        return call(q, key, value, block_mask=mask, enable_gqa=True)

    attends = {"sdpa": sdpa} | ({"flex": flexible} if compiled else {})
    rows = []
    for name, attend in attends.items():
        plain = lambda attend=attend: attend(sources[0], sources[2])  # noqa: E731
        for kind, run in (("plain", plain), ("rebuilt", lambda attend=attend: rebuilt(attend))):
            milliseconds = _time(torch, run, rounds)
            rows.append({"contestant": f"{kind}, {name}", "ms": milliseconds})
    print(json.dumps(rows))


def _time(torch: Any, run: Any, rounds: int) -> float:
    """Median milliseconds of ten runs in a row."""
    found = []
    for turn in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            run()
        torch.cuda.synchronize()
        if turn:
            found.append((time.perf_counter() - start) / 10 * 1e3)
    return statistics.median(found)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3])))
