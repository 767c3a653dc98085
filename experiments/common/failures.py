"""Expected failures end a program with one line and an exit code; bugs keep their traceback."""

import errno
import os
import pathlib
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import flags

from experiments.common import overrides, parsing, wording
from fusedkv_jax.validation import nearest_names

FLAGS = flags.FLAGS

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT
BROKEN_PIPE_EXIT_CODE = 128 + signal.SIGPIPE

_ROOT = pathlib.Path(__file__).parents[2]
_OUR_FOLDERS = tuple(_ROOT / name for name in ("experiments", "fusedkv_jax", "pallas_kernels"))
# Conditions of the machine rather than of a file: they count wherever they are raised, also as text
# in the errors of libraries that write files in C++.
_DISK = {
    errno.ENOSPC: "free some space, or name another place",
    errno.EDQUOT: "free some space, or name another place",
    errno.EFBIG: "name a place without such a limit",
    errno.EIO: "the file or the disk cannot be read or written; name another",
    errno.EROFS: "name a place that can be written",
}
# Flags that decide how much memory a program takes, and in which direction they help.
_MEMORY_FLAGS = (
    ("batch_size", "lower --batch_size"),
    ("max_num_batched_tokens", "set --max_num_batched_tokens=512"),
    ("max_tokens", "lower --max_tokens"),
    ("cache_dtype", "choose --cache_dtype=int8"),
    ("length", "lower --length"),
    ("examples", "lower --examples"),
    ("prompt_length", "lower --prompt_length"),
    ("config", "lower --config.data.batch_size or raise --config.train.grad_accumulation"),
    ("config", "choose --config.model.remat=full"),
)


def exit_with(call: Callable[[], int | None]) -> NoReturn:
    """Exit with the code that `call` returns (None is 0), or with that of an expected failure.

    - 2, with one line on standard error: a mistake of the user (`explain` lists them).
    - 130: Ctrl-C. A second Ctrl-C ends the process at once, also inside compiled code.
    - 141: the reader of standard output went away, as in `... | head`.
    """
    _watch_for_second_interrupt()
    threading.excepthook = _report_thread
    try:
        code = call() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        code = BROKEN_PIPE_EXIT_CODE
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        report(message)
        code = USER_ERROR_EXIT_CODE
    _settle_output()
    sys.exit(code)


def fail(message: str) -> NoReturn:
    """Exit with code 2 and one line."""
    report(message)
    sys.exit(USER_ERROR_EXIT_CODE)


def report(message: str) -> None:
    """One line on standard error."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def explain(error: BaseException) -> str | None:
    """One line on what went wrong and what to do; None for a bug.

    Expected are: a bad flag; a ValueError, NotImplementedError or OverflowError that our own code
    raised (from inside a library it is a bug of ours); files that are missing or cannot be read or
    written; a full or read-only disk; too little memory; input that is nested too deeply.
    """
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in _DISK or _is_out_of_memory(each):
            error = each  # wherever it was raised, and whatever it was wrapped in
            break
    if isinstance(error, OSError):
        return _explain_os_error(error)
    if _is_out_of_memory(error):
        return f"out of memory; {' or '.join(_ways_to_save()) or 'use a smaller model'}"
    if isinstance(error, RecursionError):
        return _explain_recursion(error)
    if isinstance(error, flags.Error):
        return str(error)
    if isinstance(error, (ValueError, NotImplementedError, OverflowError)) and _is_ours(error):
        return _in_flags(str(error))
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "a path begins with ~ and there is no such home directory; write the path out"
    return next((text for number in _DISK if (text := _disk_text(number, str(error)))), None)


def _in_flags(message: str) -> str:
    from fusedkv_jax.training.config import ExperimentConfig

    own = parsing.own_flags()
    fields = overrides.field_names(ExperimentConfig) if "config" in own else []
    return wording.in_flags(message, own, fields)


def did_you_mean(path: str | os.PathLike[str]) -> str:
    """A hint at the nearest name in the same folder, or at the nearest folder that exists."""
    path = pathlib.Path(path)
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"; there is no folder {str(path.parent)!r}" if not path.parent.exists() else ""
    near = nearest_names(path.name, names)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


def check_readable(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a file that can be read to its end.

    Raises:
      ValueError: it is missing, a broken link, or a pipe that would be waited for. Pipes that the
        shell has opened (`<(command)`) are read.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise ValueError(_missing(path))
    is_file = stat.S_ISREG(path.stat().st_mode) or path.parts[:2] == ("/", "dev")
    if not is_file:
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise ValueError(f"{str(path)!r} is {kind}; name a file")
    return path


def _missing(path: str | os.PathLike[str]) -> str:
    if os.path.islink(path):
        return f"{str(path)!r} is a link to {os.readlink(path)!r}, which does not exist"
    return f"no such file or folder {str(path)!r}{did_you_mean(path)}"


def _explain_os_error(error: OSError) -> str | None:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return _missing(os.fsdecode(error.filename))
    if error.errno in _DISK:
        where = f" (writing {os.fsdecode(error.filename)!r})" if error.filename else ""
        return f"{os.strerror(error.errno)}{where}; {_DISK[error.errno]}"
    if error.filename is not None and error.strerror:
        return f"{error.strerror}: {os.fsdecode(error.filename)!r}"
    return str(error) if _is_ours(error) else None


def _disk_text(number: int, text: str) -> str | None:
    words = os.strerror(number)
    return f"{words}; {_DISK[number]}" if words.lower() in text.lower() else None


def _explain_recursion(error: RecursionError) -> str | None:
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)][-20:]
    for part, what in (("json", "JSON"), ("jinja2", "a template"), ("<template>", "a template")):
        if any(part in file for file in files) or part in str(error).lower():
            return f"{what} is nested too deeply, or calls itself without end"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED")
    )


def _ways_to_save() -> list[str]:
    return [advice for name, advice in _MEMORY_FLAGS if name in FLAGS]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        for inner in getattr(error, "exceptions", ()):  # of an exception group
            yield from _chain(inner)
        # What was raised `from None` says it all itself.
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_ours(error: BaseException) -> bool:
    """Whether the statement that raised the error is in one of our packages."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    raised_in = pathlib.Path(frames[-1].filename)
    return any(raised_in.is_relative_to(folder) for folder in _OUR_FOLDERS)


def _report_thread(failed: threading.ExceptHookArgs) -> None:
    """What ends a thread is told as shortly as what ends the program."""
    message = None if failed.exc_value is None else explain(failed.exc_value)
    if message is None:
        threading.__excepthook__(failed)
    else:
        report(message)


def _settle_output() -> None:
    """Let what the interpreter writes at exit go nowhere, if standard output cannot take it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Interrupts:
    pending = False  # a Ctrl-C has come, and nothing says yet that the program goes on


def interrupt_answered() -> None:
    """The program goes on after a Ctrl-C: the next one is a first one again."""
    _Interrupts.pending = False


def _watch_for_second_interrupt() -> None:
    """End the process at the second Ctrl-C, even where Python cannot look at signals.

    Python's own handler waits for the end of what runs outside Python: a compilation or a decode
    loop of minutes. The byte that it writes to a pipe does not.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def watch() -> None:
        while received := os.read(reader, 1):
            if received[0] == signal.SIGINT:
                if _Interrupts.pending:
                    os._exit(INTERRUPTED_EXIT_CODE)
                _Interrupts.pending = True

    threading.Thread(target=watch, name="second Ctrl-C", daemon=True).start()
