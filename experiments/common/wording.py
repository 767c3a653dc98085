"""What the library says of arguments and fields, in the words of the command line."""

import re
from collections.abc import Iterable

# NAME=VALUE, or NAME at the beginning of a sentence about it; not in a path, a quotation, a flag
# or an option of something else (snapkv:budget=3).
_NAMED = re.compile(r"(?<![\w.\-/'\":,(])([a-z]\w*(?:\.\w+)*)(?==)|^([a-z]\w*(?:\.\w+)*)(?= must )")


def in_flags(message: str, own: Iterable[str], fields: Iterable[str]) -> str:
    """A message with flags where it names what they set.

    Args:
      message: an error of the library, which names arguments and fields: `train.steps=0 must be`.
      own: the program's flags.
      fields: dotted fields that --config.FIELD sets.
    """
    own, fields = set(own), list(fields)

    def spell(match: re.Match[str]) -> str:
        name = match[0]
        if name in own:
            return f"--{name}"
        # A part does not know where it lies in the whole: num_heads is model.num_heads.
        paths = [field for field in fields if field == name or field.endswith(f".{name}")]
        return f"--config.{paths[0]}" if len(paths) == 1 and _begins(match, name) else name

    return _NAMED.sub(spell, message)


def _begins(match: re.Match[str], name: str) -> bool:
    """Whether it is surely the field: a dotted name, or what the message begins with."""
    return "." in name or match.start() == 0
