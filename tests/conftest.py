"""Shared fixtures; eight CPU devices, so that meshes can be tested without hardware."""

import importlib.util
import os
import pathlib
import signal
import tempfile
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # else XLA has much to say of each program that it reads

import jax
import pytest

from gpt2_jax.run.compile_cache import set_compile_cache

# Compiling takes most of the time: each program is compiled once per session, or once for all where a folder is named.
_COMPILED = "GPT2_JAX_TEST_COMPILE_CACHE"
if not os.environ.get(_COMPILED):
    _compiled = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ[_COMPILED] = _compiled.name
set_compile_cache(os.environ[_COMPILED])
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # else the first run of train.py in this process would join it to a coordinator, which ends with that run

# Shells start background jobs with Ctrl-C ignored, and what the tests start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder with Tiny Shakespeare, GPT-2's BPE files and golden ids."""
    folder = os.environ.get("GPT2_JAX_TEST_DATA", "")
    if not folder:
        pytest.skip("GPT2_JAX_TEST_DATA is not set: the test data sets are not here")
    return pathlib.Path(folder)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_dropped() -> Iterator[None]:
    """Each compiled program has memory mappings, and a process may have 65,530 of them before XLA crashes."""
    yield
    jax.clear_caches()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that compile for TPUs need the compiler."""
    if item.get_closest_marker("tpu") and importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'gpt2-jax[tpu]'")
