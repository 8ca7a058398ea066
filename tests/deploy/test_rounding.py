"""Kernels in bfloat16: the nearest numbers, of kernels alone."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from c_networks import network_of
from dacnn.deploy.c.formats import upper_halves
from dacnn.deploy.lower import lower
from dacnn.deploy.rounding import in_bfloat16, rounded
from dacnn.errors import DeployError


@given(st.lists(st.integers(0, 2**32 - 1).filter(lambda bits: bits & 0x7F800000 != 0x7F800000), min_size=1))
def test_numbers_become_those_that_pytorch_takes(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    expected = torch.from_numpy(values.copy()).bfloat16()
    got = rounded(values)
    assert got.tobytes() == expected.float().numpy().tobytes()
    assert upper_halves(got).tobytes() == expected.view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("share", ["all", "template", "repeat"])
def test_kernels_are_rounded_and_nothing_else(share: str) -> None:
    program = lower(network_of("dacnn5", ("a", "b"), width=8, share=share))
    got = in_bfloat16(program)
    assert got.steps == program.steps and got.tensors.keys() == program.tensors.keys()
    for name, tensor in program.tensors.items():
        # of two dimensions is a linear kernel, or the gains of a repetition, which are no kernel
        kernel = tensor.ndim > 2 or name == "classifier.weight"
        assert (got.tensors[name].view(np.uint32) & 0xFFFF == 0).all() or not kernel, name
        assert np.array_equal(got.tensors[name], tensor) != kernel, name


def test_what_bfloat16_cannot_be_is_refused() -> None:
    program = lower(network_of("dacnn3", ("a", "b"), width=4))
    name = next(name for name, tensor in program.tensors.items() if tensor.ndim == 4)
    for bits in (0x7F7FFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001):
        wrong = {**program.tensors, name: np.full(program.tensors[name].shape, bits, np.uint32).view(np.float32)}
        with pytest.raises(DeployError, match=f"'{name}' has values that are no numbers, or above 3.39e38"):
            in_bfloat16(dataclasses.replace(program, tensors=wrong))
