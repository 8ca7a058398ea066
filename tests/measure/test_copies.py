"""A kernel is found again whatever a tool did to its copy, and two kernels are never taken for one."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray

from dacnn.measure.copies import Group, group_copies
from dacnn.measure.stored import StoredArray

SHAPES = ((8, 8, 3, 3), (24, 8, 3, 3), (16, 3, 5, 5), (8, 1, 3, 3), (32, 1, 5, 5), (16, 16, 1, 1), (12, 20), (64, 4), (8, 8, 3))
BLOCKABLE = ((8, 8, 3, 3), (24, 24, 3, 3), (16, 3, 3, 3), (20, 12, 3, 3), (32, 1, 3, 3), (32, 16, 1, 1))


def stored(values: NDArray[np.generic], dtype: str = "", blocked: bool = False) -> StoredArray:
    return StoredArray(("kernel",), "tensor", values, dtype or str(values.dtype), values.nbytes, blocked=blocked)


def groups(*arrays: NDArray[np.generic]) -> list[Group]:
    return group_copies([stored(array) for array in arrays])


def words_of(kernel: NDArray[np.generic], copy: NDArray[np.generic]) -> tuple[str, ...]:
    """How `copy` is said to differ; both are one kernel."""
    found = groups(kernel, copy)
    assert [len(group.others) for group in found] == [1]
    return found[0].others[0][1].words


def draw(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def scales(channels: int, dimensions: int, axis: int, seed: int) -> NDArray[np.float32]:
    """Factors of both signs, one for each channel, in the shape that multiplies along an axis."""
    random = np.random.default_rng(seed)
    factors = random.uniform(0.1, 3, channels) * random.choice([-1, 1], channels)
    return factors.astype(np.float32).reshape([channels if index == axis else 1 for index in range(dimensions)])


def in_blocks(kernel: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """ONNX Runtime's order, number by number: [O/B][I/B][H][W][Bi][Bo], or [O/B][I][H][W][Bo] where I is below B."""
    outputs, inputs, height, width = kernel.shape
    full_outputs = -(-outputs // block) * block
    of_inputs = 1 if inputs < block else block
    full_inputs = -(-inputs // of_inputs) * of_inputs
    numbers = []
    for output in range(0, full_outputs, block):
        for input in range(0, full_inputs, of_inputs):
            for row in range(height):
                for column in range(width):
                    for one in range(input, input + of_inputs):
                        for other in range(output, output + block):
                            inside = one < inputs and other < outputs
                            numbers.append(kernel[other, one, row, column] if inside else 0)
    return np.array(numbers, np.float32).reshape(full_outputs, full_inputs, height, width)


# ---------------------------------------------------------------- copies are found


@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_an_equal_array_is_an_exact_copy(shape: tuple[int, ...], seed: int) -> None:
    kernel = draw(shape, seed)
    assert words_of(kernel, kernel.copy()) == ("exact",)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_a_scaled_copy_is_found(shape: tuple[int, ...], axis: int, seed: int) -> None:
    kernel = draw(shape, seed)
    copy = kernel * scales(shape[axis], len(shape), axis, seed)
    (word,) = words_of(kernel, copy)
    # the one input channel of a depthwise kernel has one factor
    expected = "scaled by one factor" if shape[axis] == 1 else f"scaled per {('output', 'input')[axis]} channel"
    assert word == expected


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 2, 3, 1), (2, 3, 1, 0)])
@pytest.mark.parametrize("scaled", [False, True])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_a_transposed_copy_is_found(order: tuple[int, ...], scaled: bool, seed: int) -> None:
    kernel = draw((24, 16, 3, 3), seed)
    copy = (kernel * scales(24, 4, 0, seed) if scaled else kernel).transpose(order).copy()
    names = {(1, 0, 2, 3): "transposed", (0, 2, 3, 1): "channels last", (2, 3, 1, 0): "HWIO"}
    assert words_of(kernel, copy) == (*(["scaled per output channel"] if scaled else []), names[order])


def test_a_matrix_is_found_transposed_and_a_kernel_as_a_matrix() -> None:
    matrix = draw((10, 32), 0)
    assert words_of(matrix, matrix.T.copy()) == ("transposed",)
    kernel = draw((16, 8, 3, 3), 0)
    assert words_of(kernel, kernel.reshape(16, 72) * scales(16, 2, 0, 1)) == ("scaled per output channel",)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("shape", BLOCKABLE)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=3, deadline=None)
def test_a_blocked_copy_is_found(shape: tuple[int, int, int, int], block: int, scaled: bool, seed: int) -> None:
    kernel = draw(shape, seed)
    copy = in_blocks(kernel * scales(shape[0], 4, 0, seed) if scaled else kernel, block)
    words = words_of(kernel, copy)
    assert words[:-1] == (("scaled per output channel",) if scaled else ())
    # a depthwise kernel in one block is its transpose, whatever the block's size
    assert words[-1] == f"blocked by {block}" or (shape[1] == 1 and "blocked" in words[-1])


def test_blocked_copies_are_found_among_themselves_and_with_blocks_as_dimensions() -> None:
    kernel = draw((32, 16, 3, 3), 0)
    one, two = (in_blocks(kernel * scales(32, 4, 0, seed), 16) for seed in (1, 2))
    assert words_of(one, two) == ("scaled per output channel",)
    assert words_of(kernel, two.reshape(2, 1, 3, 3, 16, 16)) == ("scaled per output channel", "blocked by 16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=5, deadline=None)
def test_a_copy_in_a_narrow_type_is_found(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    kernel = draw(shape, seed)
    scaled = torch.from_numpy(kernel * scales(shape[0], len(shape), 0, seed))
    narrow = scaled.to(getattr(torch, dtype)).float().numpy()
    # as read from a file of that type, and as a float32 tensor that was of that type before
    for copy in (stored(narrow, dtype), stored(narrow)):
        (group,) = group_copies([stored(kernel), copy])
        assert group.others[0][1].words == ("scaled per output channel", f"rounded to {dtype}")


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_copies_quantised_by_channel_are_found(seed: int) -> None:
    kernel = draw((16, 16, 3, 3), seed)
    copies = [kernel, *(kernel * scales(16, 4, 0, seed + index) for index in range(2))]
    steps = [np.abs(copy).max(axis=(1, 2, 3), keepdims=True) / 127 for copy in copies]
    (group,) = groups(kernel, *((copy / step).round().astype(np.int8) for copy, step in zip(copies, steps, strict=True)))
    assert len(group.others) == 3
    assert all(difference.words == ("scaled per output channel", "rounded to int8") for _, difference in group.others)


def test_channels_that_a_scale_of_zero_silenced_do_not_hide_a_copy() -> None:
    kernel = draw((16, 8, 3, 3), 0)
    silenced = kernel * np.where(np.arange(16) % 3, 2, 0).astype(np.float32).reshape(16, 1, 1, 1)
    silenced[12:] = 0
    assert words_of(kernel, silenced) == ("scaled per output channel",)
    # from the full kernel to the silenced one, in whichever order they are stored
    (group,) = groups(silenced, kernel)
    assert group.first == 1 and group.others[0][1].words == ("scaled per output channel",)


def test_many_copies_of_many_kernels_are_sorted_out() -> None:
    kernels = [draw((16, 16, 3, 3), seed) for seed in range(5)]
    arrays = [kernel * scales(16, 4, 0, index) for index, kernel in enumerate(kernels * 6)]
    found = groups(*arrays)
    assert sorted(sorted([group.first, *(index for index, _ in group.others)]) for group in found) == [
        list(range(start, 30, 5)) for start in range(5)
    ]


# ---------------------------------------------------------------- nothing else is


@given(seed=st.integers(0, 10**6), shapes=st.lists(st.sampled_from([*SHAPES, *BLOCKABLE]), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_two_kernels_are_never_copies(seed: int, shapes: list[tuple[int, ...]]) -> None:
    arrays = [draw(shape, seed + index) for index, shape in enumerate(shapes * 2)]
    assert all(not group.others for group in groups(*arrays))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_two_kernels_of_a_narrow_type_are_never_copies(dtype: str, seed: int) -> None:
    def narrow(values: NDArray[np.float32]) -> StoredArray:
        return stored(torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy(), dtype)

    arrays = [narrow(draw(shape, seed + index)) for index, shape in enumerate(SHAPES * 2)]
    # regulators that have hardly left the identity with which all of them began
    arrays += [narrow(np.eye(16, dtype=np.float32) + 1e-3 * draw((16, 16), seed + 100 + index)) for index in range(3)]
    assert all(not group.others for group in group_copies(arrays))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_two_quantised_kernels_are_never_copies(seed: int) -> None:
    def quantised(values: NDArray[np.float32], step: float) -> NDArray[np.int8]:
        return (values / step).round().clip(-128, 127).astype(np.int8)

    arrays = [quantised(draw(shape, seed + index), step) for index, shape in enumerate(SHAPES * 2) for step in (0.03, 0.5)]
    arrays = [arrays[index] for index in range(0, len(arrays), 2)] + [
        quantised(np.eye(16, dtype=np.float32) + 1e-2 * draw((16, 16), seed + 100 + index), 1 / 127) for index in range(3)
    ]
    distinct = len({array.tobytes() for array in arrays})
    assert sum(not group.others for group in groups(*arrays)) == len(arrays) == distinct


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_kernel_that_learnt_a_little_is_another_one(seed: int) -> None:
    kernel = draw((8, 8, 3, 3), seed)
    # a thousandth of its size: an optimiser's step, far above what rounding does to float32
    assert len(groups(kernel, kernel + 1e-3 * draw(kernel.shape, seed + 1))) == 2


@pytest.mark.parametrize("scaled", [False, True])
def test_identities_shifts_and_constants_are_copies_of_nothing(scaled: bool) -> None:
    identity = np.eye(16, dtype=np.float32).reshape(16, 16, 1, 1)
    depthwise = np.zeros((16, 1, 3, 3), np.float32)
    depthwise[:, 0, 1, 1] = 1
    once = [identity, np.roll(identity, 1, axis=0), depthwise, np.ones((16, 16), np.float32), np.zeros((16, 16), np.float32)]
    again = [array * (scales(16, array.ndim, 0, 1) if scaled else np.float32(1)) for array in once]
    assert all(not group.others for group in groups(*once, *again))


def test_one_filter_repeated_over_the_channels_is_not_enough_to_call_two_layers_copies() -> None:
    blur = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32) / 16
    layers = [np.tile(blur, (16, 1, 1, 1)) * scales(16, 4, 0, seed) for seed in (0, 1)]
    assert len(groups(*layers)) == 2


def test_numbers_that_are_not_finite_are_compared_by_their_bytes_alone() -> None:
    mask = draw((16, 16), 0)
    mask[0, 0] = np.inf
    assert words_of(mask, mask.copy()) == ("exact",)
    assert len(groups(mask, 2 * mask)) == 2
