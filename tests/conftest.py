"""Every test runs in float64, with strict dtype and rank rules; warnings are errors (pyproject.toml).

A session has a folder for what XLA compiles, which its workers and the programs that tests start share: a program is
compiled once. It is empty at first and gone at the end, unless ``JAX_COMPILATION_CACHE_DIR`` names another.

LLVM compiles with few optimisations, unless ``XLA_FLAGS`` says otherwise: most programs here run once.
"""

import atexit
import gc
import os
import shutil
import tempfile

CACHE = "JAX_COMPILATION_CACHE_DIR"
if CACHE not in os.environ:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="dgm_jax_tests_")
    atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
SECONDS = float(os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1"))

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # on a busy machine its threads wait for each other

import jax  # noqa: E402

jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

gc.set_threshold(100_000, 50, 100)  # tracing makes many small objects that live on: 7 per cent of the time
