"""What the documentation tells its readers to type: shell commands, and code in fences."""

import dataclasses
import pathlib
import re
import shlex
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile*"))
# Programs and configurations begin with the commands that run them.
SOURCES = sorted([*ROOT.glob("experiments/*.py"), *ROOT.glob("experiments/configs/*.py")])
# Words that stand for something of the reader's own.
PLACES = {"HOST:PORT": "localhost:8476", "/shared/run": "shared_run"}
# What a span of code in a sentence or a table begins with where it is a command.
STARTS = ("python -m", "make ", "pip install", "fusedkv ", "lm_eval", "jupytext", ".ci/run")

_FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.M | re.S)
_SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
_SETTING = re.compile(r"\w+=.*", re.S)
_DOCSTRING_COMMAND = re.compile(r"python -m experiments\.(\w+)([^`\n#(|]*)")


@dataclasses.dataclass(frozen=True)
class Fence:
    """A block of code between lines of three backticks.

    Attributes:
        language: the word behind the first backticks; empty if there is none.
        text: its lines, without the indentation of the fence.
        follows: text between the block before, or the beginning of the page, and this one.
    """

    language: str
    text: str
    follows: str


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: a program with its arguments.

    Attributes:
        where: the file that has it, from the root of the repository.
        settings: environment variables before it, NAME=value.
        words: program and arguments.
    """

    where: str
    settings: tuple[str, ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join([*self.settings, *self.words])}"


def fences(path: pathlib.Path) -> list[Fence]:
    """The blocks of a page, in order."""
    page, found, end = path.read_text(encoding="utf-8"), [], 0
    for match in _FENCE.finditer(page):
        lines = match[3].splitlines(keepends=True)
        text = "".join(line.removeprefix(match[1]) for line in lines)
        found.append(Fence(match[2], text, page[end : match.start()]))
        end = match.end()
    return found


def commands(path: pathlib.Path) -> list[Command]:
    """Every command of a page, of a module's docstring, or of a Dockerfile's first comment."""
    where = str(path.relative_to(ROOT))
    if path.suffix == ".py":
        return list(_of_docstring(path, where))
    if path.suffix != ".md":
        comment = re.findall(r"^#   (.*)", path.read_text(encoding="utf-8"), re.M)
        return list(split("\n".join(comment), where))
    found = []
    for fence in fences(path):
        if fence.language == "sh":
            found += split(fence.text, where)
        elif fence.language == "yaml":
            for match in re.finditer(r"command: \[(.*?)\]", fence.text, re.S):
                words = tuple(word.strip() for word in match[1].split(","))
                found.append(Command(where, (), words))
    prose = _FENCE.sub("", path.read_text(encoding="utf-8"))
    for span in _SPAN.findall(prose):
        bare = re.sub(r"^(\w+=\S+\s+)+", "", span)
        if bare.startswith(STARTS):
            found += split(span.replace("\n", " "), where)
    return found


def settings(path: pathlib.Path) -> list[str]:
    """Spans that set a field of the configuration: `--config.FIELD=VALUE`."""
    prose = _FENCE.sub("", path.read_text(encoding="utf-8"))
    return [span for span in _SPAN.findall(prose) if re.match(r"--config\.[a-z]\S*=\S+$", span)]


def split(text: str, where: str) -> Iterator[Command]:
    """The commands of lines of shell, also those that other programs are told to start."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    text = re.sub(r"(^|\s)#.*$", r"\1", text, flags=re.M)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|()\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not word.strip(";&|()\n"):
            yield from _of_words(words, where)
            words = []
        elif word not in ("...", "\u2026"):
            words.append(word)


def _of_words(words: list[str], where: str) -> Iterator[Command]:
    count = next((i for i, w in enumerate(words) if not _SETTING.fullmatch(w)), len(words))
    if words[count:]:
        yield Command(where, tuple(words[:count]), tuple(words[count:]))
    # srun, mpirun: what they start; gcloud's ssh: a shell's line.
    if words[count + 1 :] and "python" in words[count + 1 :]:
        yield Command(where, (), tuple(words[words.index("python", count + 1) :]))
    for word in words[count:]:
        if word.startswith("--command="):
            yield from split(word.removeprefix("--command="), where)


def _of_docstring(path: pathlib.Path, where: str) -> Iterator[Command]:
    text = path.read_text(encoding="utf-8").split('"""')[1].replace("\\\\\n", "\\\n")
    text = re.sub(r"\s*\\\n\s*", " ", text)
    for program, rest in _DOCSTRING_COMMAND.findall(text):
        line = re.split(r"\s{2,}|\[", rest.strip().rstrip(".,;:"))[0]
        words = tuple(word for word in shlex.split(line) if word.startswith("-") and word != "...")
        yield Command(where, (), ("python", "-m", f"experiments.{program}", *words))


def everything() -> list[Command]:
    return [command for path in [*PAGES, *SOURCES, *DOCKERFILES] for command in commands(path)]


def program_line(command: Command) -> tuple[str, list[str]] | None:
    """(program, arguments) of a command that starts one of ours, in whatever way."""
    words = list(command.words)
    if words[0].endswith("python") and words[1:2] == ["-m"]:
        name = words[2].removeprefix("experiments.")
        return (name, words[3:]) if words[2].startswith("experiments.") else None
    if words[0] == "fusedkv":
        return (words[1], words[2:]) if words[1] != "--help" else None
    if words[0] == "make" and words[1] in ("gpu", "bench", "demo"):
        given = dict(word.split("=", 1) for word in words[2:]).get("ARGS", "")
        return {"bench": "benchmark"}.get(words[1], words[1]), shlex.split(given)
    if words[0] == "docker" and words[1] == "run":
        image = next(i for i, word in enumerate(words) if re.fullmatch(r"fusedkv(:\w+)?", word))
        return words[image + 1], words[image + 2 :]
    return None


def placed(arguments: list[str], config: pathlib.Path) -> list[str]:
    for name, own in {**PLACES, "MINE.py": str(config)}.items():
        arguments = [argument.replace(name, own) for argument in arguments]
    return arguments
