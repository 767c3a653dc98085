"""A real model, SmolLM2-135M-Instruct in 4 bits: the same predictions and text as transformers."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.data import tokenizers
from fusedkv_jax.data.chat import load_template
from fusedkv_jax.interop import load_gguf, save_gguf_tokenizer, save_huggingface
from tests.docs.make import ROOT, make_chat
from tests.interop import smollm2

pytestmark = pytest.mark.slow
MESSAGES = [{"role": "user", "content": "Name three rivers of Europe, and 12345 bytes.\n  Thanks"}]
TEXT = "  The cache of 3072 bytes isn't large:\n\n\tdéjà vu, 日本語 🙂 don't DON'T  end"
NEW_TOKENS = 24


def test_make_chat_answers(tmp_path):
    """What the target runs, with the model given: each time the same, as it draws nothing."""
    arguments = make_chat()
    command = [sys.executable, "-m", "experiments.generate", "--chat", f"--model={smollm2.path()}"]
    run = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--temperature=0" in arguments and "The capital of France is Paris." in run.stdout


def test_the_same_tokens_loss_and_text_as_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = smollm2.path()
    # transformers reads a file's tokenizer by itself, its weights only with one more package.
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    save_gguf_tokenizer(path, tmp_path)
    tokenizer = tokenizers.load(str(tmp_path))
    for text in (TEXT, "def f(x):\n    return x ** 2", "1234567890 12 3"):
        assert tokenizer.encode(text) == their_tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = load_template(tmp_path).render(MESSAGES)
    assert prompt == their_tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.encode(prompt, allow_special=True)
    assert ids == their_tokenizer.encode(prompt, add_special_tokens=False)

    model = load_gguf(path)
    save_huggingface(model, tmp_path / "exported", tokenizer=tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    tokens = torch.tensor([ids])
    with torch.no_grad():
        expected = theirs(tokens).logits[0].numpy()
        written = theirs.generate(tokens, do_sample=False, max_new_tokens=NEW_TOKENS)
    logits = np.asarray(model(jnp.asarray([ids]))[0])
    # 4-bit weights give logits of up to 30; both sum in float32, in another order.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-3)
    params = fkv.SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    (completion,) = fkv.generate(model, [ids], params, tokenizer=tokenizer)
    found = list(completion.outputs[0].token_ids)
    assert found == written[0, len(ids) :].tolist()[: len(found)] and len(found) > 5
