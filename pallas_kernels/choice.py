"""Which implementation serves a call: their names, and the table behind "auto".

Not one row rests on a timing of our own on an accelerator: there was none to time on. Rows cite
published timings, the compiler's static schedules or arithmetic from data sheets, and say which.
`python -m experiments.benchmark --suite=kernels` on a device tells whether a row holds there.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels import devices, stacked
from pallas_kernels.call import AttentionCall, PagedAttentionCall, RaggedAttentionCall
from pallas_kernels.paged_stream import PagedStream
from pallas_kernels.phases import DECODE, PAGED, SEQUENCE

# Every module has `attention` and may have `paged_attention` and `ragged_attention`, which get the
# record of such a call, return (out, lse), and raise NotImplementedError for what they do not
# serve. Imported when first asked for: a machine without CUDA lacks what "triton" imports, and
# loses nothing.
MODULES: dict[str, str] = {
    "tpu": "pallas_kernels.tpu",
    "triton": "pallas_kernels.gpu",
    "mosaic_gpu": "pallas_kernels.mosaic_gpu",
    "cudnn": "pallas_kernels.cudnn",
    "folded": "pallas_kernels.xla.folded",
    "xla": "pallas_kernels.xla",
    "reference": "pallas_kernels.reference",
}

Call = AttentionCall | PagedAttentionCall | RaggedAttentionCall

# Sources that an implementation reads where they lie; instead of others it gets what `read` makes.
IN_PLACE = {"tpu": stacked.Stacked, "xla": (stacked.Stacked, PagedStream)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallTraits:
    """What the table looks at.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: the device's own name of its kind, such as "TPU v5 lite".
      phase: one of `phases`: "sequence" (training and prefill: many queries), "decode" (few
        queries against a longer cache) or "paged".
      sources: the larger number of sources that are mixed; 1 without weights.
      size: the larger head size of keys and values.
    """

    platform: str
    kind: str
    phase: str
    sources: int
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
    """One row of the table: on `platform`, in `phases`, if `condition`, use `implementation`."""

    platform: str
    phases: Sequence[str]
    implementation: str
    evidence: str
    condition: Callable[[CallTraits], bool] = lambda call: True

    def matches(self, call: CallTraits) -> bool:
        """The row is about this call."""
        return (
            self.platform in ("any", call.platform)
            and call.phase in self.phases
            and self.condition(call)
        )


def matrix_unit(kind: str) -> int:
    """Width of the matrix unit of a TPU; 128, the smallest, for one that is not in the table."""
    chip = devices.tpu(kind)
    return 128 if chip is None else chip.matrix


# Matching rows are tried from the top; a row whose implementation refuses the call is passed over.
TABLE = (
    Preference(
        platform="tpu",
        phases=(SEQUENCE, DECODE, PAGED),
        implementation="tpu",
        evidence="Compiler schedule (v5e, v6e), not timed: mixing or folding inside a kernel costs "
        "0 to 20 % more bundles than plain attention; outside it writes K^ and V^ of every layer.",
    ),
    Preference(
        platform="tpu",
        phases=(SEQUENCE,),
        implementation="folded",
        condition=lambda call: call.sources * call.size <= matrix_unit(call.kind),
        evidence="Compiler schedule, not timed: a contraction of J * H channels costs what one of "
        "H costs as long as the matrix unit is that wide (published autotuning timings agree).",
    ),
    Preference(
        platform="gpu",
        phases=(SEQUENCE, DECODE, PAGED),
        implementation="triton",
        evidence="Data-sheet arithmetic, not timed: decoding waits for memory, and a kernel reads "
        "each source once; many queries: segments and lengths without a bias, and no K^ and V^ in "
        "memory. Name 'cudnn' for plain causal sequences: its published rates are 1.6 of Triton's; "
        "or on Hopper 'mosaic_gpu', which no GPU has run yet, so no row names it.",
    ),
    Preference(
        platform="any",
        phases=(SEQUENCE, DECODE, PAGED),
        implementation="xla",
        evidence="Measured on two CPU cores (docstrings of pallas_kernels/xla): there is no other "
        "on a CPU. On accelerators the fallback; linear memory, not timed.",
    ),
)


def names() -> tuple[str, ...]:
    """All implementations, kernels first."""
    return tuple(MODULES)


def device() -> tuple[str, str]:
    """Platform and kind of the device that is compiled for.

    An abstract device (`jax.sharding.use_abstract_mesh`) counts before the devices at hand, so
    that a program for a TPU can be compiled on a machine without one.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.platform, abstract.device_kind
    found = jax.devices()[0]
    return found.platform, found.device_kind


def describe(phase: str, sources: int, size: int) -> CallTraits:
    """A call on the device that is compiled for."""
    platform, kind = device()
    return CallTraits(
        platform="gpu" if platform in ("cuda", "rocm") else platform,
        kind=kind,
        phase=phase,
        sources=sources,
        size=size,
    )


def candidates(call: CallTraits) -> tuple[str, ...]:
    """Implementations that "auto" tries for a call, in order."""
    return tuple(dict.fromkeys(row.implementation for row in TABLE if row.matches(call)))


def load(name: str, form: str) -> Callable:
    """The function `form`, such as "attention" or "paged_attention", of an implementation.

    Raises:
      NotImplementedError: a package that it needs is missing, or it has no such form.
    """
    try:
        module = importlib.import_module(MODULES[name])
    except ImportError as error:
        raise NotImplementedError(
            f"implementation {name!r} needs what is missing: {error}"
        ) from None
    function = getattr(module, form, None)
    if function is None:
        raise NotImplementedError(f"implementation {name!r} has no {form}")
    return function


def check_name(implementation: Any) -> None:
    """Raises ValueError unless it names an implementation, or is "auto"."""
    known = ("auto", *MODULES)
    if implementation not in known:
        near = difflib.get_close_matches(str(implementation), known, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"implementation is {implementation!r}; it must be one of {', '.join(known)}{hint}"
        )


def run(implementation: str, call: Call) -> Any:
    """Has the named implementation serve a call, or for "auto" the first of the table that does.

    Raises:
      ValueError: the name is unknown.
      NotImplementedError: the named implementation refuses the call, or with "auto" all do.
    """
    if implementation != "auto":
        check_name(implementation)
        return _serve(implementation, call)
    refusals = []
    for name in candidates(describe(call.phase, call.mixed, call.size)):
        try:
            return _serve(name, call)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError("no implementation serves this call; " + "; ".join(refusals))


def _serve(name: str, call: Call) -> Any:
    if isinstance(call, PagedAttentionCall):
        if 0 in (*call.q.shape[:2], call.page_table.shape[1]):
            name = "reference"  # zeros, or nothing: kernels have no blocks for it
        return load(name, "paged_attention")(call)
    if isinstance(call, RaggedAttentionCall):
        return load(name, "ragged_attention")(call)
    if 0 in (*call.q.shape[:2], call.sources.keys[0].shape[1]):
        name = "reference"
    kept = IN_PLACE.get(name, ())
    keys, values = (stacked.read(side, kept) for side in call.sources[:2])
    sources = call.sources._replace(keys=keys, values=values)
    return load(name, "attention")(dataclasses.replace(call, sources=sources))
