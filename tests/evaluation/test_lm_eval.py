"""lm-eval's tasks on a model of ours, against lm-eval's own class for PyTorch."""

import json
import os
import subprocess
import sys

import pytest

from fusedkv_jax.interop import load_gguf, save_gguf_tokenizer, save_huggingface
from tests.data.test_tokenizers import train_bpe
from tests.interop import smollm2
from tests.oracles.decoder import random_decoder, small_config

pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval and what it needs
for name in ("lm_eval", "torch", "transformers", "accelerate", "peft"):
    pytest.importorskip(name, exc_type=ImportError)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
DOCUMENTS = [
    {"question": "the thesis ", "choices": ["the theme", "them", "is"], "answer": 1},
    {"question": "", "choices": ["a", "these other themes"], "answer": 0},
    # Longer than the model's context.
    {"question": "the theme of the thesis: " * 16, "choices": [" 1", " 22"], "answer": 1},
]
COMMON = """
dataset_path: json
test_split: test
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
"""
TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list: [{metric: bits_per_byte}]
""",
    "write": """
output_type: generate_until
doc_to_text: "{{question}} {{choices[0]}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in transformers' format."""
    folder = tmp_path_factory.mktemp("model")
    train_bpe(folder / "tokenizer.json", tuple(SPECIAL.values()))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    config = small_config("mha", num_layers=2, vocab_size=300, max_length=64, qk_norm=False)
    save_huggingface(random_decoder(config), folder / "exported", tokenizer=folder)
    return folder / "exported"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    common = COMMON.format(data=data, cache=folder / "cache")
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{common}{task}")
    return folder


@pytest.fixture(scope="module")
def models(folder):
    return both(folder)


def both(folder):
    """An exported model, as ours and as lm-eval's own class has it."""
    from lm_eval.models.huggingface import HFLM

    from fusedkv_jax.evaluation.lm_eval import FusedKV

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    return FusedKV(model=str(folder), batch_size=2), theirs


@pytest.mark.parametrize("chat", [False, True])
def test_every_document_is_answered_as_by_pytorch(chat, models, tasks):
    check_every_document(models, tasks, chat, within=1e-4)


@pytest.mark.slow
def test_a_pretrained_model_answers_as_by_pytorch(tasks, tmp_path):
    path = smollm2.path()
    save_gguf_tokenizer(path, tmp_path / "tokenizer")
    exported = tmp_path / "exported"
    save_huggingface(load_gguf(path), exported, tokenizer=tmp_path / "tokenizer")
    # Its logits reach 30, and what is asked for is the sum over a text.
    check_every_document(both(exported), tasks, chat=True, within=5e-3)


def check_every_document(models, tasks, chat, within):
    """Both models answer all tasks alike."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    ours, theirs = (
        lm_eval.simple_evaluate(
            model=model, tasks=list(TASKS), task_manager=manager, apply_chat_template=chat,
            bootstrap_iters=0,
        )
        for model in models
    )  # fmt: skip
    for task in TASKS:
        samples = list(zip(ours["samples"][task], theirs["samples"][task], strict=True))
        assert len(samples) == len(DOCUMENTS)
        for mine, other in samples:
            check_answers(task, mine["filtered_resps"], other["filtered_resps"], within)
            assert mine["arguments"] == other["arguments"]
    assert any(sample["filtered_resps"] != [""] for sample in ours["samples"]["write"])


def check_answers(task, found, expected, within):
    """Answers to a document: texts, log-likelihoods, or these and whether each is greedy."""
    if task == "choose":
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        found, expected = ([value for value, _ in each] for each in (found, expected))
    if task != "write":
        assert all(value < 0 for value in found)
        expected = pytest.approx(expected, abs=within, rel=1e-6)
    assert found == expected


@pytest.mark.slow
def test_the_documented_command_gives_what_lm_evals_own_does(folder, tasks, tmp_path):
    """Both from the command line to the files of samples, document by document."""
    options = ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--batch_size", "2"]
    ours = run_command(
        ["fusedkv_jax.evaluation.lm_eval", "--model", "fusedkv_jax"]
        + ["--model_args", f"model={folder}", *options],
        tmp_path / "ours",
    )
    theirs = run_command(
        ["lm_eval", "--model", "hf", "--device", "cpu"]
        + ["--model_args", f"pretrained={folder},dtype=float32", *options],
        tmp_path / "theirs",
    )
    for task in TASKS:
        assert ours[task].keys() == theirs[task].keys() == set(range(len(DOCUMENTS)))
        for number, found in ours[task].items():
            check_answers(task, found, theirs[task][number], within=1e-4)


def run_command(arguments, output):
    """Run a module of the command line; answers by task and document."""
    given = ["-m", *arguments, "--log_samples", "--output_path", str(output)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *given], env=os.environ | offline, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for task in TASKS:
        assert f"\n|{task}" in done.stdout  # a row of the table
        (file,) = output.glob(f"*/samples_{task}_*.jsonl")
        documents = map(json.loads, file.read_text().splitlines())
        found[task] = {each["doc_id"]: values(each["filtered_resps"]) for each in documents}
    return found


def values(answers):
    """What lm-eval wrote as text, as it was."""
    if isinstance(answers, list):
        return [values(answer) for answer in answers]
    if answers in ("True", "False"):
        return answers == "True"
    try:
        return float(answers)
    except ValueError:
        return answers


def test_greedy_continuations_are_known_as_such(models):
    from lm_eval.api.instance import Instance

    def ask(kind, arguments):
        requests = [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]
        return [getattr(model, kind)(requests) for model in models]

    asked = [("the thesis", {"until": [], "max_gen_toks": 4})]
    (written,), (expected,) = ask("generate_until", asked)
    assert written == expected and written
    ours, theirs = ask("loglikelihood", [("the thesis", written), ("the thesis", written[:-1])])
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    with pytest.raises(ValueError, match="num_beams"):
        models[0]._params({"num_beams": 4})


def test_spaces_alone_are_no_context(models, monkeypatch):
    """lm-eval moves them to the continuation, and its own class refuses what is left."""
    from lm_eval.api.instance import Instance

    ours = models[0]
    monkeypatch.setattr(ours, "add_bos_token", False)
    asked = [("  ", "the"), ("", "  the")]
    found = ours.loglikelihood([Instance("loglikelihood", {}, each, 0) for each in asked])
    assert found[0] == found[1] and found[0][0] < 0


def test_lm_eval_knows_the_model_by_its_name():
    """What the command needs; lm-eval's index of its own tasks takes it half a minute more."""
    from importlib.metadata import entry_points

    from lm_eval.api.registry import get_model

    from fusedkv_jax.evaluation.lm_eval import FusedKV

    assert get_model("fusedkv_jax") is FusedKV
    (entry,) = entry_points(group="lm_eval.models", name="fusedkv_jax")
    assert entry.load() is FusedKV


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "workdir=DIR"),
        ({"model": "a", "workdir": "b"}, "workdir=DIR"),
        ({"model": "a", "step": 3}, "step"),
        ({"model": "a", "add_bos_token": "no"}, "add_bos_token='no'; use True or False"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    from fusedkv_jax.evaluation.lm_eval import FusedKV

    with pytest.raises(ValueError, match=message):
        FusedKV(**arguments)
