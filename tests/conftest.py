"""Every test runs in float64, with strict dtype and rank rules; warnings are errors (pyproject.toml).

A session has a folder for what XLA compiles, which its workers and the programs that tests start share: a program is
compiled once, the smallest too, of which a test has a hundred. It is empty at first and gone at the end, unless
``JAX_COMPILATION_CACHE_DIR`` names another. What a file of tests has compiled leaves memory with it.

XLA compiles with little effort, unless ``XLA_FLAGS`` says otherwise, for most programs here run once: few
optimisations, one piece rather than many for threads that the other worker needs, and where it can (jaxlib 0.10) the
older of its code generators, which takes two thirds of the newer one's time. It still shows the mistakes of jax 0.10.2
that tests/test_guard.py is about. And it compiles for memory rather than for concurrency: on several cores a program
that jaxlib 0.10 compiles for concurrency can stall for ever, with no thread at work ("Known limits" in README.md).
"""

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile

CACHE = "JAX_COMPILATION_CACHE_DIR"
if CACHE not in os.environ:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="dgm_jax_tests_")
    atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
SECONDS = float(os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"))

FLAGS = "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
FLAGS += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # others do not know it, and abort
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # on a busy machine its threads wait for each other

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

gc.set_threshold(100_000, 50, 100)  # tracing makes many small objects that live on: 7 per cent of the time


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # modules and tests stay: no later collection looks at them


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Compiled programs and their traces: a worker would hold 5 GB of them in the end, which slows collections too."""
    yield
    jax.clear_caches()
    gc.collect()
