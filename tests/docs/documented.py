"""What the documentation tells its readers to type: commands, and Python in fences."""

import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
# Programs and configurations begin with the commands that run them.
SOURCES = sorted([*ROOT.glob("experiments/*.py"), *ROOT.glob("experiments/configs/*.py")])
_COMMAND = re.compile(r"python -m experiments\.(\w+)([^`\n#(|]*)")


def commands(path: pathlib.Path) -> list[tuple[str, list[str]]]:
    """(program, arguments) of every command of a page, or of a module's docstring."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = text.split('"""')[1].replace("\\\\\n", "\\\n")
    text = re.sub(r"\s*\\\n\s*", " ", text)
    # A span of code may go on in the next line.
    text = re.sub(r"(`[^`\n]+)\n([^`\n]+`)", r"\1 \2", text)
    found = []
    for program, rest in _COMMAND.findall(text):
        words = re.split(r"\s{2,}|\[", rest.strip().rstrip(".,;:"))[0]
        if words.count('"') % 2:  # a quotation that began before the command
            words = words.replace('"', "")
        arguments = [word for word in shlex.split(words) if word.startswith("-")]
        found.append((program, [word for word in arguments if word != "..."]))
    return found


def snippets(path: pathlib.Path) -> list[str]:
    """The fenced Python of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
