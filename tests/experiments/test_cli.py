"""What all programs have in common: help, flags without effect, and failures in one line."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.common import failures, helptext, wording
from fusedkv_jax.training import ExperimentConfig
from tests.experiments.commands import PROGRAMS, run_several

ROOT = pathlib.Path(__file__).parents[2]

FOLDER = pathlib.Path(__file__).parent
# Command lines with a flag that has no effect, or that is no flag, and what is said about it.
REFUSED = [
    ("evaluate --workdir=x --cache_dtype=int8", "needs --suite=length or --suite=longcontext"),
    ("evaluate --workdir=x --compression=h2o", "needs --suite=longcontext"),
    ("evaluate --workdir=x --tasks=text --suite=length", "needs --suite=longcontext"),
    ("evaluate --workdir=x --step=3 --suite=longcontext", "--step has no effect"),
    ("generate --workdir=x --prompt=a --exit_layer=2", "without --draft_tokens"),
    ("generate --workdir=x --prompt=a --adaptive_draft", "without --draft_tokens"),
    ("generate --workdir=x --prompt=a --system=s", "without --chat"),
    ("generate --workdir=x --prompt=a --chat", "--prompt has no effect with --chat"),
    ("generate --workdir=x --prompt=a --temperature=2 --beam_width=2", "with --beam_width"),
    ("generate --workdir=x --prompt=a --stop=x --beam_width=2", "with --beam_width"),
    ("generate --workdir=x --prompt=a --length_penalty=2", "without --beam_width"),
    ("generate --workdir=x --prompt=a --logprobs=2", "it needs --format=json"),
    ("generate --workdir=x --prompt=a --prefill_parts=equal", "without --mesh"),
    ("describe --list --preset=4b", "with --list"),
    ("describe --length=3", "without --preset"),
    ("benchmark --suite=training --torch_compile", "it needs --suite=cpu or"),
    ("compile_for_tpu --topology=v5e:4x4 --trials=2", "without --search"),
    ("compile_for_tpu --topology=v5e:4x4 --config=demo --layout=mha", "without --preset"),
    ("describe --num_layers=1000000", "error: --num_layers=1000000; use at most 10,000"),
    (
        "train --config=demo --workdir=x --config.model.num_layers=1000000",
        "--config.model.num_layers=1000000; use at most 10,000",
    ),
    (
        "train --config=demo --workdir=x --config.train.steps=0",
        "error: --config.train.steps=0; use a whole number",
    ),
    ("train --config=demo --config.optimizer.eps=-1", "error: --config.optimizer.eps=-1"),
    ("train --config=demo --config.mesh.fsdp=0", "error: --config.mesh.fsdp=0"),
    (
        "prepare_data --input=x --output_dir=y --num_shards=0",
        "error: --num_shards=0; use a whole number from 1",
    ),
    ("demo --workdir=x --repeats=0", "error: --repeats=0; use 1 or more"),
    ("train --config=demo --workdir=x --config.data.batch_size=1000000000", "lower one of them"),
    ("costs --lenght=3", "did you mean --length?"),
    ("costs --pdb", "unknown flag --pdb"),
    ("costs --v=1", "unknown flag --v;"),
    ("costs --undefok=x --x=1", "--undefok is not served"),
    ("costs --length=1 --length=2", "--length is given 2 times"),
    ("costs 3", "unexpected argument '3'"),
    ("generate --workdir=x --prompt=a --temperature=nan", "--temperature=nan is not a finite"),
    ("prune --workdir=x --budget=inf", "--budget=inf is not a finite"),
    ("train --config=demo --workdir=x --train.steps=1", "--config.train.steps=VALUE"),
    ("train --config=demo --workdir=x --config.optimizer.learning_rate=nan", "not of type float"),
    ("train --config=demo --config.train.steps=1 --config.train.steps=2", "is given twice"),
    ("train --config=(((", "is unknown"),
    ("train --config=~no_such_person/x.py --workdir=x", "no such home directory"),
    (f"train --config=demo --workdir={__file__}", "is a file; name a directory"),
    (f"demo --workdir={__file__}", "is a file; name a folder"),
    (f"reproduce --output={__file__}/table", "is a file; name a folder"),
    (f"prepare_data --input={__file__} --output_dir={__file__}/x", "Not a directory"),
    (f"prepare_data --input={__file__} --output_dir={__file__}", "is a file; name a folder"),
    (f"prepare_data --input={FOLDER} --output_dir={FOLDER}/new", "new is within the input"),
    (f"convert --model={FOLDER} --output={FOLDER}/new", "new is within the input"),
    (f"prepare_data --input={__file__} --output_dir={FOLDER}", "is not empty; name a new folder"),
    (f"convert --model=x --output={FOLDER}", "is not empty; name a new folder"),
    ("prepare_data --input= --output_dir=x", "--input= is empty"),
    ("prepare_data --input=x --output_dir=y --ray=auto --workers=2", "no effect with --ray"),
    ("prepare_data --input=x --output_dir=", "--output_dir= is empty"),
    ("reproduce --layouts=", "--layouts= is empty"),
    ("convert --model=x --output=y --check --text=", "--text= is empty"),
    ("train --config=demo --workdir=x --wandb_project=", "--wandb_project= is empty"),
    ("train --config=demo --workdir=x --connect_seconds=-1", "--connect_seconds=-1; use 1 or"),
    ("evaluate --workdir=, --suite=longcontext", "--workdir=, names no run"),
    ("prune --workdir=x --budget=x", "--budget=x: use a number"),
    ("costs --length=1e3", "--length=1e3: use a whole number"),
    ("train --config=demo --workdir=x --profile_steps=1:2 --step=1", "unknown flag --step"),
    ("generate --workdir=x --prompt=a --logit_bias=4:1 --logit_bias=4:2", "token 4 twice"),
    ("generate --workdir=x --prompt=a --compression=h2o:budget=4,budget=5", "sets budget twice"),
    ("demo --workdir=x --prompt_length=1000000000", "--prompt_length=1000000000; use 1,000,000"),
    (f"inspect --workdir={__file__}", "is not a directory"),
]


def _contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path: path.read_bytes() for path in files}


def test_flags_without_effect_and_mistakes_are_refused():
    before = _contents(FOLDER)
    found = run_several([(line.split()[0], line.split()[1:]) for line, _ in REFUSED])
    for (line, message), (code, out, error) in zip(REFUSED, found, strict=True):
        assert (code, out) == (2, ""), (line, out, error)
        assert error.startswith("error: ") and error.count("\n") == 1, (line, error)
        assert message in error, (line, error)
    assert _contents(FOLDER) == before  # nothing is lost, and nothing left


def test_help_and_version_of_every_program():
    assert len(PROGRAMS) > 10
    lines = [(program, [flag]) for program in PROGRAMS for flag in ("--help", "-h", "--version")]
    found = run_several(lines)
    for (program, (flag,)), (code, out, error) in zip(lines, found, strict=True):
        assert (code, error) == (0, ""), (program, flag, error)
        if flag == "--version":
            assert out.startswith("fusedkv_jax ")
            continue
        assert "(default" in out and "--help\n" in out, program
        assert "repeat this option" not in out and "\n      \n" not in out, program
        if "--config=text" in out:
            assert "--config.train.steps=integer" in out and "batches of the whole run" in out


def test_messages_name_flags_only_where_they_mean_them():
    own, fields = (
        ("layout", "length"),
        ("model.layout", "model.num_heads", "mesh.data", "a.x", "b.x"),
    )
    for message in (
        "no such file 'runs/layout=mha'; did you mean 'layout=mha'?",
        "snapkv:length=3 is too small",
        "--layout=x is unknown",
        "mesh data=2 x fsdp=2",
        "x=3 is in two parts",
    ):
        assert wording.in_flags(message, own, fields) == message
    text = wording.in_flags("num_heads=3 with layout=mha and model.layout=x", own, fields)
    assert text == "--config.model.num_heads=3 with --layout=mha and --config.model.layout=x"


# What is loaded by `import fusedkv_jax`, and by each program's --help.
_LOADED = """
import io, json, os, runpy, sys

def loaded(call):
    reader, writer = os.pipe()
    if os.fork() == 0:
        sys.stdout = io.StringIO()
        try:
            call()
        except SystemExit:
            pass
        os.write(writer, " ".join({name.partition(".")[0] for name in sys.modules}).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        return file.read().split()

def show_help(program):
    sys.argv = [program, "--help"]
    runpy.run_module(f"experiments.{program}", run_name="__main__", alter_sys=True)

found = {"library": loaded(lambda: __import__("fusedkv_jax"))}
for program in sys.argv[1:]:
    found[program] = loaded(lambda: show_help(program))
print(json.dumps(found))
"""
# Seconds to import, each.
_HEAVY = {
    "grain",
    "matplotlib",
    "orbax",
    "pyarrow",
    "scipy",
    "tensorboardX",
    "torch",
    "transformers",
}
_COMPUTING = {"flax", "jax", "jaxlib", "optax", "tokenizers"}


def test_importing_and_help_load_little():
    command = [sys.executable, "-c", _LOADED, *PROGRAMS]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    for name, modules in json.loads(done.stdout).items():
        assert name == "library" or "absl" in modules
        assert not (_HEAVY | _COMPUTING) & set(modules), name


def test_every_field_of_the_configuration_has_a_type_and_a_meaning():
    fields = {field.path: field for field in helptext.describe_fields(ExperimentConfig)}
    assert [f.path for f in fields.values() if not (f.kind and f.meaning and f.default)] == []
    assert fields["model.remat"].kind == "none|full|dots|qkv"
    assert fields["model.rope.theta"].default == "10000.0"
    assert fields["data.seq_len"].default == "none; required"
    assert fields["train.peak_flops"].kind == "number"


CONFIGS = {
    "syntax.py": ("def get_config(:\n", "syntax.py:1: SyntaxError"),
    "name.py": ("x = 1\ny = nothing\n", "name.py:2: NameError: name 'nothing' is not defined"),
    "call.py": ("def get_config():\n    return 1 / 0\n", "call.py:2: ZeroDivisionError"),
    "deep.py": ("x = " + "(" * 2000, "SyntaxError: too many nested parentheses"),
}


def test_configuration_files_with_mistakes(tmp_path):
    for name, (text, _) in CONFIGS.items():
        (tmp_path / name).write_text(text)
    os.mkfifo(tmp_path / "fifo.py")
    (tmp_path / "broken.py").symlink_to("gone.py")
    cases = [(str(tmp_path / name), message) for name, (_, message) in CONFIGS.items()] + [
        (str(tmp_path / "fifo.py"), "not a regular file"),
        (str(tmp_path / "broken.py"), "is a link to 'gone.py', which does not exist"),
        (str(tmp_path / "nam.py"), f"did you mean '{tmp_path / 'name.py'}'?"),
        (str(tmp_path / "none" / "x.py"), f"there is no folder '{tmp_path / 'none'}'"),
    ]
    found = run_several([("train", [f"--config={path}", "--workdir=x"]) for path, _ in cases])
    for (path, message), (code, _, error) in zip(cases, found, strict=True):
        assert code == 2 and error.count("\n") == 1 and message in error, (path, error)


def _raised(error):
    try:
        raise error
    except BaseException as caught:
        return caught


def _deep_json():
    try:
        json.loads("[" * 100_000)
    except RecursionError as error:
        return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: OSError(errno.ENOSPC, "x", "a.bin"), "No space left on device (writing 'a.bin')"),
        (lambda: OSError(errno.EROFS, "x"), "Read-only file system; name a place"),
        (lambda: ValueError("write failed: no space left on device"), "No space left on device;"),
        (lambda: PermissionError(13, "Permission denied", "f"), "Permission denied: 'f'"),
        (lambda: MemoryError(), "out of memory; "),
        (lambda: RuntimeError("RESOURCE_EXHAUSTED: Out of memory while"), "out of memory; "),
        (lambda: ExceptionGroup("x", [OSError(errno.ENOSPC, "x")]), "No space left on device;"),
        (_deep_json, "JSON is nested too deeply"),
    ],
)
def test_failures_in_one_line(error, message):
    assert failures.explain(_raised(error())).startswith(message)


def test_bugs_keep_their_traceback():
    for error in (KeyError("x"), ValueError("of a library"), RecursionError(), OSError("odd")):
        assert failures.explain(_raised(error)) is None


def _python(code, **options):
    # A shell starts what runs in its background, these tests perhaps, with Ctrl-C ignored.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from experiments.common import failures\n{code}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_closed_pipe_is_silent_and_a_full_device_is_one_line():
    writing = "failures.exit_with(lambda: print('x' * 100_000))"
    with _python(writing, stdout=subprocess.PIPE) as child:
        child.stdout.close()
        assert (child.wait(), child.stderr.read()) == (141, "")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full, _python(writing, stdout=full) as child:
            assert child.wait() == 2
            assert child.stderr.read().startswith("error: No space left on device")


def test_ctrl_c_once_and_twice():
    printing = "import time\nfailures.exit_with(lambda: (print('ready', flush=True), {}))"
    with _python(printing.format("time.sleep(60)"), stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        child.send_signal(signal.SIGINT)
        assert (child.wait(20), child.stderr.read()) == (130, "interrupted\n")
    # Python looks at no signal while one call in C goes on, such as a compilation.
    busy = "__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    with _python(printing.format(busy), stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        for _ in range(2):
            time.sleep(0.5)
            assert child.poll() is None
            child.send_signal(signal.SIGINT)
        try:
            assert child.wait(20) == 130
        finally:
            child.kill()


def test_compiled_programs_are_kept_unless_the_environment_says_otherwise(tmp_path):
    program = (
        "from experiments.common.compilation import keep_compiled_programs as keep\n"
        "folder = keep()\nimport jax\n"
        "config = jax.config\n"
        "print(folder, config.jax_compilation_cache_dir, config.jax_enable_compilation_cache)"
    )
    quiet = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    quiet |= {"XDG_CACHE_HOME": str(tmp_path), "HOME": "/nowhere"}
    cases = {
        "": "True",
        "JAX_COMPILATION_CACHE_DIR=/elsewhere": "None /elsewhere True",
        "JAX_ENABLE_COMPILATION_CACHE=false": "None None False",
        "XDG_CACHE_HOME=/proc/nowhere": "None None True",
    }
    for setting, wanted in cases.items():
        name, _, value = setting.partition("=")
        environment = quiet | ({name: value} if name else {})
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip().endswith(wanted), (setting, done)
    assert list(tmp_path.glob("fusedkv_jax/compiled/*"))
