"""The fast convolutions in C give what float64 gives: every instruction set, compiler and odd shape, also under sanitizers."""

import dataclasses
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from c_networks import ARM64, command_of, tool
from dacnn.deploy.c.fast import fast_values
from dacnn.deploy.c.formats import BFLOAT16, FLOAT32
from dacnn.deploy.c.isa import AVX2, AVX512, ISAS, VECTOR
from dacnn.deploy.c.winograd import scratch_floats, transformed, transformed_floats, winograd_pays

DRIVER = Path(__file__).parent / "c_fast_driver.c"
STRICT = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror")
BUILDS = {"optimised": ("-O2",), "sanitized": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")}
MADE = [*((cc, build) for cc in ("gcc", "clang") for build in BUILDS), (ARM64, "optimised")]
MISSING = 77
DIRECT, DEPTHWISE, WINOGRAD, TRANSFORM = range(4)
# of the largest result: float32 rounds some hundred products; Winograd's points multiply that by four
TOLERANCE = {DIRECT: 2e-6, DEPTHWISE: 2e-6, WINOGRAD: 5e-6, TRANSFORM: 5e-7}

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """A convolution of one image, its input and output: H rows, W columns, O output and I input channels."""

    what: int
    height: int
    width: int
    inputs: int
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    scale: bool = True
    residual: bool = False
    relu: bool = False
    pool: bool = False
    bfloat16: bool = False

    def out(self) -> tuple[int, int]:
        """Rows and columns before pooling."""
        size = (self.height, self.width)
        return tuple(  # type: ignore[return-value]
            (size[d] + self.padding[d] + self.padding[d + 2] - self.dilation[d] * (self.kernel[d] - 1) - 1) // self.stride[d]
            + 1
            for d in (0, 1)
        )


SIZES = [(1, 1), (2, 2), (3, 5), (4, 4), (5, 7), (8, 8), (9, 4), (13, 10), (17, 18)]
CHANNELS = [(1, 16), (3, 10), (16, 33), (38, 38), (20, 64)]
SHAPES = [(*size, *channels) for size in SIZES for channels in CHANNELS]
BEHIND = [{"scale": False}, {"residual": True, "relu": True}, {"pool": True, "relu": True}, {"pool": True, "residual": True}]
UNLIKE = [
    {"kernel": (1, 1), "padding": (0, 0, 0, 0)},
    {"kernel": (5, 5), "padding": (2, 2, 2, 2)},
    {"kernel": (2, 3), "padding": (0, 2, 1, 0)},
    {"stride": (2, 2)},
    {"stride": (1, 2), "padding": (0, 1, 2, 3)},
    {"dilation": (2, 1), "padding": (2, 1, 2, 1)},
]
FLOATING = [
    *(Case(what, *shape, **BEHIND[index % 4]) for what in (DIRECT, WINOGRAD) for index, shape in enumerate(SHAPES)),
    *(Case(DIRECT, 9, 6, *channels, **unlike, relu=True) for unlike in UNLIKE for channels in CHANNELS),
    *(Case(DIRECT, 6, 7, 12, 60, groups=groups, pool=groups == 2) for groups in (2, 3, 6)),
    *(Case(DEPTHWISE, 7, 9, width, width, groups=width, **behind) for width in (1, 21, 64) for behind in BEHIND),
    *(Case(WINOGRAD, 7, 9, 5, 20, padding=padding) for padding in ((0, 0, 0, 0), (2, 2, 2, 2), (0, 1, 2, 0))),
    *(Case(TRANSFORM, 1, 1, *channels) for channels in CHANNELS),
]
# each with a kernel of bfloat16 too
CASES = [*FLOATING, *(dataclasses.replace(case, bfloat16=True) for case in FLOATING)]


def arrays(case: Case, seed: int) -> tuple[Array, Array, Array, Array, Array]:
    """Image (H, W, I), kernel (O, I / groups, kernel's H, W), rounded if it is read as bfloat16, scale, shift and residual."""
    drawn = np.random.default_rng(seed)
    shapes = (
        (case.height, case.width, case.inputs),
        (case.outputs, case.inputs // case.groups, *case.kernel),
        (case.outputs,),
        (case.outputs,),
        (*case.out(), case.outputs),
    )
    image, kernel, *behind = (drawn.standard_normal(shape).astype(np.float32) for shape in shapes)
    if case.bfloat16:
        kernel = torch.from_numpy(kernel).bfloat16().float().numpy()
    return image, kernel, *behind  # type: ignore[return-value]


def expected(case: Case, seed: int) -> NDArray[np.float64]:
    """What the case gives, in float64."""
    image, kernel, scale, shift, residual = (values.astype(np.float64) for values in arrays(case, seed))
    if case.what == TRANSFORM:
        return transformed(kernel.astype(np.float32)).astype(np.float64)
    padded = np.pad(image, (case.padding[::2], case.padding[1::2], (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, tuple(d * (k - 1) + 1 for d, k in zip(case.dilation, case.kernel, strict=True)), axis=(0, 1)
    )[:: case.stride[0], :: case.stride[1], :, :: case.dilation[0], :: case.dilation[1]]
    groups = zip(np.split(windows, case.groups, axis=2), np.split(kernel, case.groups), strict=True)
    sums = np.concatenate([np.einsum("hwiab,oiab->hwo", window, part) for window, part in groups], axis=2)
    if case.scale:
        sums = sums * scale + shift
    if case.residual:
        sums = sums + residual
    if case.relu:
        sums = np.maximum(sums, 0)
    rows, columns = (size // 2 for size in case.out())
    if case.pool:
        sums = sums[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2, case.outputs).max((1, 3))
    return sums.ravel()


def blocked(case: Case, kernel: Array) -> Array:
    """[block of 16 outputs][H][W][I][width of the block], group by group; depthwise [H][W][C]."""
    if case.what == DEPTHWISE:
        return kernel[:, 0].transpose(1, 2, 0).ravel()
    blocks = [
        part[first : first + 16].transpose(2, 3, 1, 0).ravel()
        for part in np.split(kernel, case.groups)
        for first in range(0, len(part), 16)
    ]
    return np.concatenate(blocks)


def encoded(case: Case, seed: int, results: int) -> bytes:
    """A case as the driver reads it."""
    image, kernel, scale, shift, residual = arrays(case, seed)
    none = np.zeros(0, np.float32)
    sizes = (
        *image.shape,
        *case.out(),
        case.outputs,
        *case.kernel,
        *case.stride,
        *case.padding[:2],
        *case.dilation,
        case.groups,
    )
    head = np.array(
        [case.what + 4 * case.bfloat16, results, scratch_floats(case.inputs), *sizes, case.relu, case.pool], np.int32
    )
    parts = (
        image,
        blocked(case, kernel),
        scale if case.scale else none,
        shift if case.scale else none,
        residual if case.residual else none,
    )
    return head.tobytes() + b"".join(np.int32(part.size).tobytes() + part.tobytes() for part in parts)


@pytest.fixture(scope="module", params=MADE, ids="-".join)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """How to run it."""
    cc, build = request.param
    folder = tmp_path_factory.mktemp("fast")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dacnn.deploy.c"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # here too, where a user's file has better code, so that it is tested
    isas = (AVX512, AVX2, dataclasses.replace(VECTOR, guard="1"))
    formats = (FLOAT32, BFLOAT16)
    values = fast_values(64, 25, depthwise=True, winograd=True, direct_formats=formats, transforms=formats, isas=isas)
    (folder / "fast.c").write_text(environment.get_template("fast.c.jinja").render(name="net", **values), encoding="ascii")
    built = folder / "driver"
    # an emulator has no libraries of the other processor to load
    static = ["-static"] * (cc == ARM64)
    subprocess.run([tool(cc), *STRICT, *BUILDS[build], *static, f"-I{folder}", "-o", built, DRIVER], check=True)
    return command_of(built, cc)


@pytest.mark.parametrize("isa", [isa.label for isa in ISAS])
def test_every_instruction_set_gives_what_float64_gives(driver: tuple[str, ...], isa: str) -> None:
    wanted = [expected(case, seed) for seed, case in enumerate(CASES)]
    text = b"".join(encoded(case, seed, wanted[seed].size) for seed, case in enumerate(CASES))
    done = subprocess.run([*driver, isa], input=text, capture_output=True, check=False)
    if done.returncode == MISSING:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr.decode()
    found = np.frombuffer(done.stdout, np.float32)
    parts = np.split(found, np.cumsum([len(one) for one in wanted])[:-1])
    for case, one, right in zip(CASES, parts, wanted, strict=True):
        if right.size:
            error = np.abs(one - right).max() / max(1.0, np.abs(right).max())
            assert error < TOLERANCE[case.what], (case, error)


def test_a_transformed_kernel_has_the_size_it_is_said_to_have() -> None:
    assert transformed(np.zeros((33, 5, 3, 3), np.float32)).size == transformed_floats(5, 33) == 36 * 5 * 48


@pytest.mark.parametrize("channels", [3, 38, 128, 512])
def test_winograd_is_for_images_of_several_tiles(channels: int) -> None:
    assert winograd_pays(channels, channels, 32, 32)
    assert not winograd_pays(channels, channels, 4, 4)
    assert not winograd_pays(channels, channels, 1, 32)


def test_a_computed_kernel_is_transformed_where_there_are_pixels_enough() -> None:
    assert winograd_pays(128, 128, 16, 16, computed=True)
    assert not winograd_pays(128, 128, 8, 8, computed=True)
