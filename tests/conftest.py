"""What every test sees: 8 virtual CPU devices, parsed flags, a compilation cache on disk."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

from experiments.common.compilation import kind_of_processor
from tests.plain_code import xla_flags

# In the environment, not through jax.config: tests that start a program hand it on.
# `JAX_PLATFORMS=cuda,cpu pytest` runs what needs an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compiling; to plain code instead of fast code it takes a third. Users
# run fast code: `.ci/run` tests a sample with it, and `pallas_kernels/test_fuzz.py` always has it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.update(XLA_FLAGS=xla_flags(os.environ))
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A second run, of the tests or of a program that they start, does not compile again what took long
# to compile. A test that measures compilation asks for the fixture `fresh_compilation`;
# JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off for a whole run.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).parents[1] / ".cache" / "jax" / kind_of_processor()),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis
import jax
import jaxtyping
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device
jax.config.update("jax_enable_x64", False)
# A plugin of pytest may have imported jax before this file, and jax reads the variables then.
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Without this Grain's worker processes raise UnparsedFlagAccessError outside absl.app.run.
flags.FLAGS.mark_as_parsed()

# Compiling makes the first example slow; the same examples each time make failures repeat.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="run every Nth collected test: a quick sample over all files",
    )
    parser.addoption(
        "--first",
        type=int,
        default=0,
        metavar="I",
        help="with --every and --every_slow: the sample begins at this test",
    )
    parser.addoption(
        "--every_slow",
        type=int,
        default=1,
        metavar="N",
        help="run all tests, but of those marked slow every Nth, from --first",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every, every_slow = config.getoption("--every"), config.getoption("--every_slow")
    first = config.getoption("--first")
    slow = [item for item in items if item.get_closest_marker("slow")]
    left_out = {item for i, item in enumerate(items) if (i - first) % every}
    left_out |= {item for i, item in enumerate(slow) if (i - first) % every_slow}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forget compiled programs before they use up the memory maps of the process.

    Each holds some; Linux allows 65,530, and beyond that XLA ends in a segmentation fault.
    """
    if nextitem is None or nextitem.path != item.path:
        maps = Path("/proc/self/maps")
        if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
            jax.clear_caches()
            gc.collect()


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """As users run it: the tests' own type checks would refuse wrong values first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def fresh_compilation() -> Iterator[None]:
    """Within the test every compilation is a real one: optimized, and not read from the disk."""
    changes = {"jax_enable_compilation_cache": False, "jax_disable_most_optimizations": False}
    before = {name: jax.config.values[name] for name in changes}
    for values in (changes, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # jax asks once a process whether there is a cache
        if values is changes:
            yield
