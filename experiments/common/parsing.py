"""Reading the command line: only our own flags, none twice, none without effect."""

import math
import sys

from absl import flags

from fusedkv_jax.validation import nearest_names

FLAGS = flags.FLAGS

# Flag -> other flag -> what its value must be for the first one to have an effect.
_RULES: dict[str, dict[str, object]] = {}
# Texts to go on from, and the system message that replaces a template's own.
_MAY_BE_EMPTY = ("prompt", "system")
# Flags that are written otherwise.
_WRITTEN = {"override": "config.FIELD", "mesh": "mesh.AXIS"}


def only_with(names: str, **conditions: object) -> None:
    """Declare that flags have an effect only with certain values of other flags.

    A command line that gives one of them without effect is refused; --help says when it has one.

    Args:
      names: flags, separated by spaces.
      conditions: flag=True (must be given), flag=False (must not be), or the value or tuple of
        values that it must have. All must hold.
    """
    for name in names.split():
        _RULES.setdefault(name, {}).update(conditions)


def rules(name: str) -> dict[str, object]:
    """The conditions under which a flag has an effect."""
    return _RULES.get(name, {})


def own_flags() -> dict[str, flags.Flag]:
    """The flags that the program defines, by name; those of libraries are not for its users."""
    found = {}
    for module, defined in FLAGS.flags_by_module_dict().items():
        # absl names the module that is run after its file.
        if module.startswith("experiments.") or module == sys.argv[0]:
            found |= {flag.name: flag for flag in defined}
    return found


def parse(argv: list[str]) -> tuple[list[str], flags.FlagValues]:
    """Set the program's flags.

    Args:
      argv: the command line, the program's name first.

    Returns:
      (what is not a flag, the program's name first; its flags, `help` and `version` among them).

    Raises:
      flags.Error: an unknown flag (ours that are near are named), or a value of the wrong type.
      ValueError: a flag given twice, without effect, empty, or with what is not a number.
    """
    values = flags.FlagValues()
    for name, flag in own_flags().items():
        values[name] = flag
    flags.DEFINE_bool("help", False, "Show this text.", flag_values=values, short_name="h")
    flags.DEFINE_bool("version", False, "Show the version.", flag_values=values)
    for arg in argv[1:]:
        if arg == "--":
            break
        if arg.lstrip("-").partition("=")[0] == "undefok" and arg.startswith("-"):
            raise ValueError("--undefok is not served: a flag that is not known is a mistake")
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        hint = _nearest(error.flagname, values)
        raise ValueError(f"unknown flag --{error.flagname}; {hint}") from None
    except flags.IllegalFlagValueError as error:
        raise ValueError(_plain(str(error))) from None
    FLAGS.mark_as_parsed()
    if not (values["help"].value or values["version"].value):
        for name in values:
            _check(name, values[name])
        _check_effects()
    return rest, values


def _plain(message: str) -> str:
    """What absl says about a value, without Python's own words."""
    head, _, reason = message.partition(": ")
    for words, meaning in (
        ("Non-boolean", "write true or false"),
        ("invalid literal for int", "use a whole number"),
        ("could not convert string to float", "use a number"),
    ):
        if words in reason:
            return f"{head}: {meaning}"
    return message


def _nearest(name: str, values: flags.FlagValues) -> str:
    known = sorted(values)
    if "override" in known and "." in name:
        return f"fields of the configuration are written --config.{name}=VALUE"
    near = nearest_names(name, known)
    if not near:
        return "--help shows all flags"
    return f"did you mean {' or '.join(f'--{each}' for each in near)}?"


def _check(name: str, flag: flags.Flag) -> None:
    many = isinstance(flag, flags.MultiFlag)
    if flag.present > 1 and not many:
        raise ValueError(f"--{name} is given {flag.present} times; give it once")
    given = flag.value if many else [flag.value]
    empty = flag.value in ([], "") or isinstance(flag.value, list) and "" in flag.value
    if flag.present and empty and name not in _MAY_BE_EMPTY:
        raise ValueError(f"--{name}= is empty; give it a value, or leave it out")
    for value in given or ():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name}={value} is not a finite number")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"--{name}={value!a} is not UTF-8 text") from None


def _check_effects() -> None:
    for name, conditions in _RULES.items():
        if name not in FLAGS or not FLAGS[name].present:
            continue
        written = _WRITTEN.get(name, name)
        for other, wanted in conditions.items():
            value = FLAGS[other].value
            if wanted is True and not value:
                raise ValueError(
                    f"--{written} has no effect without --{other}; "
                    f"add --{other} or leave --{written} out"
                )
            if wanted is False and value:
                raise ValueError(f"--{written} has no effect with --{other}; leave one of them out")
            if not isinstance(wanted, bool) and value not in _as_tuple(wanted):
                needed = " or ".join(f"--{other}={choice}" for choice in _as_tuple(wanted))
                raise ValueError(
                    f"--{written} has no effect with --{other}={value}; it needs {needed}"
                )


def _as_tuple(wanted: object) -> tuple[object, ...]:
    return wanted if isinstance(wanted, tuple) else (wanted,)


def describe_rules(name: str) -> str:
    """When a flag has an effect, in words; empty if always."""
    words = []
    for other, wanted in rules(name).items():
        if isinstance(wanted, bool):
            words.append(f"{'with' if wanted else 'without'} --{other}")
        else:
            words.append("with " + " or ".join(f"--{other}={each}" for each in _as_tuple(wanted)))
    return f"Only {' and '.join(words)}." if words else ""
