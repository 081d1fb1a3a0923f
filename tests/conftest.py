"""Settings and fixtures that every test shares."""

import gc
import os
import pathlib

# Before JAX is imported: tests run on the CPU, with four devices for those that map over devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Devices that wait for one another longer than 40 s are taken for dead; a loaded machine is not.
# Tests compile hundreds of programs that run for milliseconds each: LLVM's level 1 instead of 3
# shortens the suite, and what is tested does not depend on it (test_parity does without).
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=4"
    " --xla_backend_optimization_level=1"
    " --xla_cpu_collective_timeout_seconds=600"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600",
)
# Many tests compile the same programs; kept between runs, in a folder that git ignores.
COMPILED = pathlib.Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Part of the key otherwise, with the path of the cache, so that no two workdirs would share it.
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# CPU timings on shared machines say nothing about correctness; a fixed seed keeps a run repeatable.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, max_examples=30, print_blob=True
)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--reliability-report",
        metavar="FILE.json",
        help="write down what the tests in tests/reliability tried and what survived",
    )
    parser.addoption(
        "--kills",
        type=int,
        default=8,
        metavar="N",
        help="how often runs on a disk are killed, and how often runs in buckets; default 8",
    )


def pytest_configure(config):
    file = config.getoption("--reliability-report")
    if file and not hasattr(config, "workerinput"):  # with xdist the controller writes it
        from tests.reliability.report import Report

        config.pluginmanager.register(Report(config.invocation_params.dir / file))


# Each runs in one process from its first test to its last: the longest begin first, or the others
# have nothing to do at the end.
LONGEST = (
    *("test_buckets", "test_train", "test_kill", "test_parity", "test_step", "test_hosts"),
    *("test_models_cpu", "test_ablate", "test_study", "test_notebooks", "test_soak"),
    *("test_models", "test_encoders", "test_frozen", "test_fit", "test_affinity_network"),
    *("test_fuzz", "test_configs"),
)


def pytest_collection_modifyitems(items):
    def rank(item):
        name = item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=rank)


# Linux gives a process 65,530 mappings of memory; a compiled program takes some, a large one dozens.
# Beyond them XLA ends the process, in the middle of reading or writing a program.
MOST_MAPPINGS = 20_000
_MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def forget_programs():
    """After a test, what has been compiled is let go where a process holds much of it."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def _folder_or_skip(variable, default):
    folder = pathlib.Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"set {variable} to run this on real files: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets (research terms, so they are not part of the repository)."""
    return _folder_or_skip("DILAFF_TEST_DATA", SHARED / "data")


@pytest.fixture(scope="session")
def real_weights():
    """The folder of real pretrained weights (not part of the repository either)."""
    return _folder_or_skip("DILAFF_TEST_WEIGHTS", SHARED / "weights")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A workdir as training leaves it, of a tiny network with an affinity head; not trained."""
    from tests import tiny_run

    return tiny_run.write(tmp_path_factory.mktemp("tiny_run") / "run")


@pytest.fixture(scope="session")
def tiny_plain_run(tmp_path_factory):
    """The same without an affinity head."""
    from tests import tiny_run

    return tiny_run.write(tmp_path_factory.mktemp("tiny_run") / "plain", affinity=None)
