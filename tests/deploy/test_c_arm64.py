"""C for 64-bit ARM, whose vectors are NEON's: cross-compiled, emulated, and compared with the interpreters."""

from typing import Any, get_args

import pytest

from c_networks import ARM64, check, check_int8, integers_of, side_by_side
from dacnn.deploy.c.source import FloatDtype
from dacnn.deploy.lower import lower
from dacnn.deploy.program import Program
from dacnn.networks.network import create
from reference import one_thread, randomise  # noqa: F401  (a fixture)

FLAGS = ("-O2", "-static")
# of the largest logit, of networks of tens of layers with random statistics
RELATIVE = 1e-4


def made(name: str, **settings: Any) -> Program:
    return lower(randomise(create(name, num_classes=3, seed=0, **settings)))


@pytest.mark.parametrize("dtype", get_args(FloatDtype))
def test_neon_gives_what_the_interpreter_gives(dtype: FloatDtype) -> None:
    schemes = [made("dacnn7", width=16, share=share) for share in ("all", "stage", "template", "repeat")]
    regulated = [made("dacnn18", width=8, regulator=kind) for kind in ("pointwise", "depthwise")]
    programs = {"schemes": side_by_side(schemes), "regulators": side_by_side(regulated)}
    check(programs, ARM64, FLAGS, relative=RELATIVE, paths=("portable", "vector"), dtype=dtype)


def test_integers_are_the_same_bits() -> None:
    programs = {name: integers_of(made(name, width=16)) for name in ("dacnn7", "dacnn18-reg")}
    check_int8(programs, ARM64, FLAGS, paths=("portable",))
