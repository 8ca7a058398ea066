"""Random plans as C, under sanitizers: a few in every run of the tests, more where DACNN_FUZZ_PLANS says so."""

import os

import pytest

from c_networks import check
from dacnn.deploy.c.source import FloatDtype
from fuzz_c import BATCH, tasks
from reference import one_thread  # noqa: F401  (a fixture)

COUNT = int(os.environ.get("DACNN_FUZZ_PLANS", "10"))


@pytest.mark.parametrize("seed", range(-(-COUNT // BATCH)))
def test_any_plan_gives_what_the_interpreter_gives_and_touches_no_memory_but_its_own(seed: int) -> None:
    # of three executables one holds kernels in bfloat16
    dtype: FloatDtype = "bfloat16" if seed % 3 == 1 else "float32"
    for programs, cc, winograd in tasks(BATCH, seed, turn=seed):
        check(programs, cc, winograd=winograd, dtype=dtype)
