"""The deployment of Ray Serve, with two replicas on this machine; needs ray[serve]."""

import concurrent.futures
import json
import time
from string import ascii_lowercase as letters

import httpx2 as httpx
import pytest
from flax import nnx

import fusedkv_jax as fkv
from experiments.common import models
from fusedkv_jax.data.tokenizers import load
from fusedkv_jax.interop import save_huggingface
from fusedkv_jax.serving import Engine, ServingSettings
from tests.data import single_letters

serve = pytest.importorskip("ray.serve")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own
ENGINE = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "num_pages": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a small FusedKV model whose tokenizer knows single letters."""
    root = tmp_path_factory.mktemp("model")
    single_letters.save(root)
    config = fkv.ModelConfig(
        vocab_size=len(single_letters.WORDS),
        num_layers=4,
        d_model=16,
        num_heads=2,
        d_ff=16,
        max_length=64,
        layout="fusedkv",
        init_std=0.3,
    )
    save_huggingface(fkv.Decoder(config, rngs=nnx.Rngs(0)), root / "m", tokenizer=root)
    return root / "m"


@pytest.fixture(scope="module")
def url(folder):
    import ray

    from deploy.ray_serve import Arguments, app

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": 8765})
    arguments = Arguments(
        model=str(folder), name="toy", min_replicas=2, max_replicas=2, num_cpus=0.5, engine=ENGINE
    )
    serve.run(app(arguments))
    yield "http://127.0.0.1:8765"
    serve.shutdown()
    ray.shutdown()


def counted(url):
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    name = "vllm:prompt_tokens_total{"
    return float(next(line for line in lines if line.startswith(name)).split()[-1])


def test_two_replicas_stream_what_the_engine_gives(folder, url):
    loaded = models.load_pretrained(str(folder))
    tokenizer = load(loaded.config.data.tokenizer)
    alone = Engine(loaded.model, tokenizer, ServingSettings(**ENGINE))
    prompts = [f"the {letters[i % 26]}{letters[i // 26]} fox"[: 4 + i % 6] for i in range(100)]
    expected = dict.fromkeys(map(str, range(100)), "")
    params = fkv.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        alone.add(prompt, params, request_id=str(number))
    while alone.unfinished:
        for name, delta in alone.step():
            expected[name] += delta.text

    def ask(prompt):
        body = {"model": "toy", "prompt": prompt, "max_tokens": 16, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True}
        chunks = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line:
                    chunks.append(line.removeprefix("data: "))
        assert chunks.pop() == "[DONE]" and len(chunks) > 4
        return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, prompts))
    assert found == list(expected.values()) and len(set(found)) > 20

    total, seen = alone.stats().prompt_tokens, set()
    for _ in range(200):  # whichever replica answers
        seen.add(counted(url))
        if len(seen) == 2:
            break
        time.sleep(0.02)
    print(f"prompt tokens of the replicas: {seen}")
    # Probes of health take a token each.
    assert total <= sum(seen) < total + 60 and min(seen) > 0.2 * total
