"""A packed network gives what its program says, from one copy of each kernel, to any number of threads."""

import dataclasses
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dacnn
import foreign
from c_networks import with_rounded_kernels
from dacnn.deploy import packed
from dacnn.deploy.lower import lower
from dacnn.deploy.packing import arithmetic, fused, onednn
from dacnn.deploy.packing.arithmetic import factor_and_addend
from dacnn.deploy.packing.compiled import compiled, seconds_of
from dacnn.deploy.program import (
    IMAGES,
    Activate,
    Add,
    AveragePool,
    Carried,
    CombinedKernel,
    Convolve,
    Flatten,
    GlobalAverage,
    Linear,
    Loop,
    MaxPool,
    Multiply,
    Normalize,
    Operation,
    Program,
    RepeatedKernel,
    Rotate,
    ScaleShift,
    StoredKernel,
)
from dacnn.errors import ConfigError, DeployError, ShapeError
from dacnn.networks.adapted import Adapted
from dacnn.networks.plan import Input
from dacnn.networks.zoo import DESIGNS
from interpreter import run

# N images, C channels, H rows, W columns

# float32 against float64, of the largest logit
TOLERANCE = 1e-4
# what the kernel K has in every hand-built program: 6 -> 6 channels, 3 x 3
CHANNELS, SIDE = 6, 8
RNG = np.random.default_rng(0)
SAME = (1, 1, 1, 1)
CONVOLVED = Convolve("y", "x", StoredKernel("k"), padding=SAME)


def drawn(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


TENSORS = {
    "first": drawn(CHANNELS, 3, 3, 3) / 5,
    "k": drawn(CHANNELS, CHANNELS, 3, 3) / 5,
    "point": drawn(CHANNELS, CHANNELS, 1, 1),
    "depth": drawn(CHANNELS, 1, 3, 3),
    "grouped": drawn(CHANNELS, CHANNELS // 2, 3, 3),
    "bank": drawn(3, CHANNELS, CHANNELS, 3, 3) / 5,
    "c": drawn(3),
    "base": drawn(2, 3, 3, 3),
    "gain": drawn(3, 2),
    "steep": drawn(3, 2),
    "s": drawn(CHANNELS),
    "t": drawn(CHANNELS),
    "square": drawn(CHANNELS, CHANNELS),
}


def program_of(*steps: Operation, result: str, **tensors: np.ndarray) -> Program:
    """Steps from the value `x`, which has 6 channels and negative values too, to `result`, which is flattened if need be."""
    before = (Normalize("in", IMAGES), Convolve("x", "in", StoredKernel("first"), padding=SAME))
    input = Input(channels=3, height=SIDE, width=SIDE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    made = Program("made", input, ("a", "b"), (*before, *steps, Flatten("flat", result)), "flat", TENSORS | tensors)
    read = {name for step in made.operations() for name in map(str, dacnn.deploy.program.references(step))}
    return dataclasses.replace(made, tensors={name: tensor for name, tensor in made.tensors.items() if name in read})


def images_of(count: int, rows: int = SIDE, columns: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, rows, columns, 3), dtype=torch.uint8, generator=generator)


def error_of(got: torch.Tensor, program: Program, images: torch.Tensor) -> float:
    expected = run(program, images.numpy())
    assert got.dtype == torch.float32 and got.shape == expected.shape
    return float(np.abs(got.numpy() - expected).max() / np.abs(expected).max())


CASES: dict[str, tuple[Operation, ...]] = {
    "convolution": (CONVOLVED,),
    "convolution-scale-shift-relu": (CONVOLVED, ScaleShift("z", "y", "s", "t"), Activate("r", "z")),
    "convolution-scale": (CONVOLVED, ScaleShift("z", "y", "s", None)),
    "convolution-shift-relu": (CONVOLVED, ScaleShift("z", "y", None, "t"), Activate("r", "z")),
    "convolution-relu": (CONVOLVED, Activate("r", "y")),
    "two scales": (CONVOLVED, ScaleShift("z", "y", "s", "t"), ScaleShift("w", "z", "t", "s"), Activate("r", "w")),
    "stride": (Convolve("y", "x", StoredKernel("k"), stride=(2, 1), padding=SAME), ScaleShift("z", "y", "s", "t")),
    "uneven padding": (
        Convolve("y", "x", StoredKernel("k"), stride=(2, 2), padding=(0, 1, 2, 1)),
        ScaleShift("z", "y", "s", "t"),
    ),
    "dilation": (Convolve("y", "x", StoredKernel("k"), padding=(2, 2, 2, 2), dilation=(2, 2)), ScaleShift("z", "y", "s", "t")),
    "pointwise": (Convolve("y", "x", StoredKernel("point")), ScaleShift("z", "y", "s", "t"), Activate("r", "z")),
    "depthwise": (
        Convolve("y", "x", StoredKernel("depth"), padding=SAME, groups=CHANNELS),
        ScaleShift("z", "y", "s", "t"),
        Activate("r", "z"),
    ),
    "groups": (Convolve("y", "x", StoredKernel("grouped"), padding=SAME, groups=2), ScaleShift("z", "y", "s", "t")),
    "combined": (
        Convolve("y", "x", CombinedKernel("bank", "c"), padding=SAME),
        ScaleShift("z", "y", "s", "t"),
        Activate("r", "z"),
    ),
    "repeated": (Convolve("y", "x", RepeatedKernel("base", "gain", "steep"), padding=SAME), ScaleShift("z", "y", "s", "t")),
    "scale-shift": (ScaleShift("y", "x", "s", "t"),),
    "scale": (ScaleShift("y", "x", "s", None),),
    "nothing": (ScaleShift("y", "x", None, None), Activate("z", "y"), Add("w", "z", "x")),
    "max-pool": (MaxPool("y", "x"),),
    "max-pool, overlapping": (MaxPool("y", "x", size=(3, 3), padding=SAME),),
    "max-pool, uneven": (MaxPool("y", "x", size=(3, 2), padding=(0, 1, 1, 0)),),
    "average-pool": (AveragePool("y", "x", size=(2, 4), stride=(2, 3)),),
    "global average": (GlobalAverage("y", "x"),),
    "rotate": (Rotate("y", "x", 1), Add("z", "y", "x")),
    "rotate back": (Rotate("y", "x", -2), Convolve("z", "y", StoredKernel("k"), padding=SAME)),
    "residual": (CONVOLVED, ScaleShift("z", "y", "s", "t"), Add("w", "z", "x"), Activate("r", "w")),
    "sum of one value": (CONVOLVED, Add("w", "y", "y")),
    "product": (CONVOLVED, Multiply("w", "y", "x")),
    "gate": (
        GlobalAverage("a", "x"),
        Convolve("b", "a", StoredKernel("point")),
        Activate("g", "b", "sigmoid"),
        Multiply("w", "x", "g"),
    ),
    "linear": (
        GlobalAverage("a", "x"),
        Flatten("f", "a"),
        Linear("l", "f", StoredKernel("square")),
        ScaleShift("z", "l", "s", "t"),
        Activate("r", "z"),
    ),
    "linear without shift": (GlobalAverage("a", "x"), Flatten("f", "a"), Linear("l", "f", StoredKernel("square"))),
    "halved": (CONVOLVED, ScaleShift("z", "y", "s", "t"), Activate("r", "z"), MaxPool("p", "r", (2, 2), (2, 2))),
    "convolution and nothing": (CONVOLVED, ScaleShift("z", "y", None, None)),
    "halved without scale and shift": (CONVOLVED, Activate("r", "y"), MaxPool("p", "r", (2, 2), (2, 2))),
    "halved without ReLU": (CONVOLVED, ScaleShift("z", "y", "s", "t"), MaxPool("p", "z", (2, 2), (2, 2))),
    "halved without shift": (CONVOLVED, ScaleShift("z", "y", "s", None), Activate("r", "z"), MaxPool("p", "r", (2, 2), (2, 2))),
    "halved, seven pixels": (
        Convolve("y", "x", StoredKernel("k"), padding=(0, 0, 1, 1)),
        ScaleShift("z", "y", None, "t"),
        Activate("r", "z"),
        MaxPool("p", "r", (2, 2), (2, 2)),
    ),
    "halved and read before": (
        CONVOLVED,
        ScaleShift("z", "y", "s", "t"),
        Activate("r", "z"),
        MaxPool("p", "r", (2, 2), (2, 2)),
        GlobalAverage("a", "p"),
        GlobalAverage("b", "r"),
        Add("w", "a", "b"),
    ),
    "a value read twice": (CONVOLVED, ScaleShift("z", "y", "s", "t"), Activate("r", "z"), Add("w", "z", "r")),
    "clip": (Activate("y", "x", "clip", 0.0, 1.0),),
    "clip above": (CONVOLVED, Activate("z", "y", "clip", high=0.5)),
} | {kind: (CONVOLVED, Activate("z", "y", kind)) for kind in ("sigmoid", "silu", "hardsigmoid", "hardswish", "gelu", "tanh")}  # type: ignore[arg-type]


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go the way of oneDNN, of a CPU for which PyTorch has none, or of a GPU, but for what Triton makes of its passes."""
    if path != "onednn":
        monkeypatch.setattr(onednn, "is_available", lambda: False)
    if path == "gpu":
        monkeypatch.setattr(fused, "is_available", lambda device: True)
        monkeypatch.setattr(fused, "_compiled", lambda function: function)


@pytest.mark.parametrize("path", ["onednn", "plain", "gpu"])
@pytest.mark.parametrize("name", CASES)
def test_every_step_gives_what_the_interpreter_gives(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, monkeypatch)
    steps = CASES[name]
    program = program_of(*steps, result=steps[-1].out)
    ready = dacnn.pack(program, device="cpu")
    for count in (1, 3):
        assert error_of(ready(images_of(count)), program, images_of(count)) < TOLERANCE


@pytest.mark.skipif(not packed.has_bfloat16_units("cpu"), reason="this CPU has no units for bfloat16")
@pytest.mark.parametrize("path", ["onednn", "plain", "gpu"])
@pytest.mark.parametrize("name", CASES)
def test_every_step_runs_in_bfloat16(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, monkeypatch)
    steps = CASES[name]
    program = program_of(*steps, result=steps[-1].out)
    # 8 bits of precision in images, kernels and scales
    assert error_of(dacnn.pack(program, dtype="bfloat16", device="cpu")(images_of(2)), program, images_of(2)) < 0.05


def test_few_variants_of_the_passes_on_a_gpu_are_compiled(small: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_available", lambda: False)
    monkeypatch.setattr(fused, "is_available", lambda device: True)
    fused._compiled.cache_clear()
    compiled: list[object] = []
    compiler = torch.compile

    def backend(graph: torch.fx.GraphModule, examples: object) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiler(function, dynamic=dynamic, backend=backend))
    ready = dacnn.pack(small, device="cpu")
    for count in (1, 2, 3, 16, 32):
        assert error_of(ready(images_of(count, 32, 32)), small, images_of(count, 32, 32)) < TOLERANCE
    fused._compiled.cache_clear()
    # with and without pooling, and once more where images have a single pixel, or two; uint8 is normalised
    assert 3 <= len(compiled) <= 6, len(compiled)


def test_what_the_caller_gives_is_left_as_it_is() -> None:
    program = program_of(Activate("y", "in"), ScaleShift("z", "in", None, None), Activate("w", "z"), result="w")
    images = torch.randn(2, 3, SIDE, SIDE)
    before = images.clone()
    dacnn.pack(program, device="cpu")(images)
    assert images.equal(before)


def designs() -> list[tuple[str, dict[str, Any]]]:
    schemes: list[dict[str, Any]] = [{"share": share} for share in ("none", "stage", "template", "repeat")] + [
        {"regulator": "low-rank", "regulator_rank": 2},
        {"regulator": "depthwise"},
        {"regulator": "shift"},
    ]
    return [(name, {}) for name in DESIGNS] + [(name, one) for name in ("dacnn9", "dacnn18") for one in schemes]


@pytest.fixture(scope="module")
def small() -> Program:
    return lower(trained("dacnn14", width=16))


def trained(name: str, **changes: Any) -> dacnn.Network:
    """A network whose norms are not the identity."""
    network = dacnn.create(name, seed=0, **changes)
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0.0, 0.3, generator=generator)
            # the statistics become those of the next batch
            module.momentum = 1.0
    with torch.no_grad():
        network(torch.randn(8, 3, 32, 32, generator=generator))
    return network.eval()


@pytest.mark.parametrize(("name", "changes"), designs(), ids=str)
def test_every_network_and_scheme_gives_what_its_program_says(name: str, changes: dict[str, Any]) -> None:
    program = lower(trained(name, width=8, **changes))
    ready = dacnn.pack(program, device="cpu")
    images = images_of(2, 32, 32)
    assert error_of(ready(images), program, images) < TOLERANCE
    kernels = {name: program.tensors[name].nbytes for name in program.readers()}
    # small kernels are padded to a whole block of channels
    assert all(kernel.nbytes <= 16 * kernels[kernel.name] for kernel in ready.steps.held.packed.values())


@pytest.mark.parametrize("count", [1, 2, 7, 33])
def test_any_number_of_images_is_taken(small: Program, count: int) -> None:
    images = images_of(count, 32, 32)
    assert error_of(dacnn.pack(small, device="cpu")(images), small, images) < TOLERANCE


def test_no_image_gives_no_logits(small: Program) -> None:
    assert dacnn.pack(small, device="cpu")(images_of(0, 32, 32)).shape == (0, 10)


def test_images_may_be_normalised_already_and_in_any_memory_format(small: Program) -> None:
    ready = dacnn.pack(small, device="cpu")
    images = images_of(3, 32, 32)
    normalised = ((images / 255.0 - torch.tensor(small.input.mean)) / torch.tensor(small.input.std)).permute(0, 3, 1, 2)
    for given in (normalised, normalised.contiguous(), normalised.double(), normalised.clone().requires_grad_()):
        assert torch.allclose(ready(given), ready(images), atol=1e-3)


@pytest.mark.parametrize("size", [(48, 32), (33, 47), (64, 64)])
def test_other_sizes_of_images_go_through_where_the_steps_allow_it(small: Program, size: tuple[int, int]) -> None:
    images = images_of(2, *size)
    assert error_of(dacnn.pack(small, device="cpu")(images), small, images) < TOLERANCE


def test_eight_threads_at_once_get_the_bits_that_one_gets(small: Program) -> None:
    batches = [images_of(1 + turn % 4, 32, 32) for turn in range(64)]
    alone = dacnn.pack(small, device="cpu")
    expected = [alone(batch) for batch in batches]
    # a fresh one: threads meet new shapes at once
    ready = dacnn.pack(small, device="cpu")
    begin = threading.Barrier(8)

    def serve(thread: int) -> list[torch.Tensor]:
        begin.wait()
        return [ready(batch) for batch in batches[thread::8]]

    with ThreadPoolExecutor(8) as pool:
        for thread, results in enumerate(pool.map(serve, range(8))):
            assert all(got.equal(want) for got, want in zip(results, expected[thread::8], strict=True))


def test_autocast_around_a_call_changes_nothing(small: Program) -> None:
    ready = dacnn.pack(small, device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ready(images_of(2, 32, 32))
    assert inside.equal(ready(images_of(2, 32, 32)))


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.zeros(32, 32, 3, dtype=torch.uint8), r"shape \(32, 32, 3\): expected N x 3 x H x W"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8, N x H x W x 3"),
        (torch.zeros(1, 32, 32, 3), "expected N x 3 x H x W"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "torch.int64: expected uint8, or normalised floats"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "cannot take images of 8x8"),
        (torch.zeros(1, 3, 8, 32), "cannot take images of 8x32"),
        (np.zeros((1, 32, 32, 3), np.uint8), "images are a ndarray: expected a tensor"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(small: Program, images: Any, says: str) -> None:
    ready = dacnn.pack(small, device="cpu")
    with pytest.raises(ShapeError, match=says) as caught:
        ready(images)
    assert "\n" not in str(caught.value)
    # and it serves on
    assert ready(images_of(1, 32, 32)).isfinite().all()


def test_each_kernel_is_held_once(small: Program) -> None:
    ready = dacnn.pack(small, device="cpu")
    kernels = [name for name, readers in small.readers().items() if small.tensors[name].ndim == 4]
    assert set(ready.steps.held.packed) == set(kernels) and len(kernels) == 2
    shared = ready.steps.held.packed["anchors.width16"]
    assert small.readers()["anchors.width16"] == 12
    assert shared._plain is None
    assert shared.nbytes == len(shared.kept) * small.tensors["anchors.width16"].nbytes
    others = sum(tensor.nbytes for tensor in small.tensors.values())
    # a few layouts at the most, and of scales and shifts no second copy
    assert ready.nbytes <= len(shared.kept) * others + small.input.channels * 8


def test_what_is_packed_is_a_copy() -> None:
    network = trained("dacnn5", width=8, share="template")
    ready = dacnn.pack(network, device="cpu")
    before = ready(images_of(2, 32, 32))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert ready(images_of(2, 32, 32)).equal(before)


def test_readers_that_want_other_layouts_get_packs_of_their_own(small: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(2, 32, 32)
    expected = dacnn.pack(small, device="cpu")(images)
    # a CPU on which every size of image wants a layout of its own, as it seems
    monkeypatch.setattr(onednn, "_layout", functools.cache(lambda kernel, dtype, geometry, images, threads: f"for {images[2]}"))
    monkeypatch.setattr(onednn, "_saving", lambda *asked: 0.5)
    ready = dacnn.pack(small, device="cpu")
    shared = ready.steps.held.packed["anchors.width16"]
    assert shared.kept == ("for 32", "for 16", "for 8")
    assert "3 packs" in ready.describe() and "4x4 (made at every call)" in ready.describe()
    assert ready(images).equal(expected)


def test_a_pack_that_saves_no_time_is_not_kept(small: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_layout", functools.cache(lambda kernel, dtype, geometry, images, threads: f"for {images[2]}"))
    monkeypatch.setattr(onednn, "_saving", lambda *asked: 0.01)
    ready = dacnn.pack(small, device="cpu")
    assert ready.steps.held.packed["anchors.width16"].kept == ("for 32",)
    images = images_of(2, 32, 32)
    assert error_of(ready(images), small, images) < TOLERANCE


def test_the_trial_of_a_second_pack_gives_a_share_of_time() -> None:
    share = onednn._saving((8, 8, 3, 3), torch.float32, onednn.Geometry(padding=(1, 1)), (1, 8, 4, 4), 1)
    assert -5 < share < 1


def test_a_scale_of_nothing_leaves_the_shift_exactly() -> None:
    scale = np.array([0.0, 0.0, 1e-44, -1e-38, 1e-12, 1.0], np.float32)
    shift = np.array([0.7, 0.0, -3.3, 2e-5, 1e30, -0.1], np.float32)
    steps = (CONVOLVED, ScaleShift("z", "y", "s", "t"))
    program = program_of(*steps, result="z", s=scale, t=shift)
    images = images_of(2)
    got = dacnn.pack(program, device="cpu")(images).numpy().reshape(2, CHANNELS, -1)
    for channel in (0, 1, 2, 3, 4):
        assert (got[:, channel] == shift[channel]).all(), channel
    expected = run(program, images.numpy()).reshape(2, CHANNELS, -1)
    assert np.abs(got - expected)[:, 5].max() < 1e-5


@pytest.mark.parametrize("exponent", range(-30, 4, 3))
def test_scales_far_below_their_shifts_lose_no_more_than_float32_does(exponent: int) -> None:
    program = program_of(CONVOLVED, ScaleShift("z", "y", "s", "t"), result="z", s=np.full(CHANNELS, 10.0**exponent, np.float32))
    assert error_of(dacnn.pack(program, device="cpu")(images_of(2)), program, images_of(2)) < 1e-5


def test_factor_and_addend_are_finite_for_any_scale_and_shift() -> None:
    values = np.array([0, 1e-45, 1e-38, 1e-20, 1, 1e20, 3e38])
    scale, shift = (axis.ravel() for axis in np.meshgrid(np.concatenate([values, -values]), np.concatenate([values, -values])))
    for dtype in (torch.float32, torch.bfloat16):
        factor, addend = factor_and_addend(scale, shift, dtype)
        assert addend is not None and factor.isfinite().all() and addend.isfinite().all()


def test_bfloat16_without_units_for_it_is_float32_and_says_so(small: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "has_bfloat16_units", lambda device: False)
    ready = dacnn.pack(small, dtype="bfloat16", device="cpu")
    assert ready.dtype == torch.float32
    assert "bfloat16 asked for, but this CPU has no units for it: float32" in ready.describe()
    assert dacnn.pack(small, dtype="auto", device="cpu").dtype == torch.float32


def test_auto_takes_bfloat16_where_there_are_units(small: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "has_bfloat16_units", lambda device: True)
    monkeypatch.setattr(packed, "Packed", lambda program, place, chosen, reason: (chosen, reason))
    assert dacnn.pack(small, dtype="auto", device="cpu") == (torch.bfloat16, "bfloat16, for which this CPU has units")
    assert dacnn.pack(small, device="cpu") == (torch.float32, "float32")


def test_a_description_names_every_kernel(small: Program) -> None:
    ready = dacnn.pack(small, device="cpu")
    told = ready.describe()
    assert "anchors.width16 16x16x3x3: " in told and "classifier.weight 10x16: as stored" in told and "32x32" in told
    assert f"{ready.nbytes:,} bytes" in told and "\n" not in repr(ready)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "float16"}, "dtype is 'float16': expected auto, float32 or bfloat16"),
        ({"device": "nowhere"}, "device is 'nowhere': expected 'cpu' or 'cuda'"),
        ({"device": "meta"}, "device is 'meta': expected 'cpu' or 'cuda'"),
        ({"engine": "fortran"}, "engine is 'fortran': expected pytorch, c or auto"),
        ({"engine": "c", "winograd": "on"}, "winograd is 'on': expected init, file or off"),
        ({"winograd": "off"}, "winograd is 'off', but engine is 'pytorch', which has none: use 'c' or 'auto'"),
    ],
)
def test_settings_that_there_are_not_are_refused(small: Program, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        dacnn.pack(small, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(small: Program) -> None:
    with pytest.raises(ConfigError, match="PyTorch finds no GPU here: use 'cpu'"):
        dacnn.pack(small, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
# of PyTorch's own, as it compiles
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", TOLERANCE), ("bfloat16", 2e-2)])
def test_a_gpu_gives_what_the_program_says(small: Program, dtype: Any, tolerance: float) -> None:
    ready = dacnn.pack(small, device="cuda", dtype=dtype)
    # the second time by the graph that was recorded the first time, in whatever mode
    for count, inference in ((1, True), (3, False), (1, False)):
        with torch.inference_mode(inference):
            logits = ready(images_of(count, 32, 32)).cpu()
        assert error_of(logits, small, images_of(count, 32, 32)) < tolerance


def test_a_program_with_loops_is_refused() -> None:
    loop = Loop((2,), (Carried("c", "x", "y"),), (Convolve("y", "c", StoredKernel("k"), padding=SAME),))
    program = program_of(loop, result="c")  # type: ignore[arg-type]
    with pytest.raises(DeployError, match="has loops"):
        dacnn.pack(program, device="cpu")


def test_expressions_are_evaluated_when_they_are_read_and_not_kept() -> None:
    ready = dacnn.pack(program_of(*CASES["combined"], result="r"), device="cpu")
    bank = TENSORS["bank"].nbytes
    assert ready.steps.held.plain["bank"].nbytes == bank
    kernels = sum(kernel.nbytes for kernel in ready.steps.held.packed.values())
    assert ready.nbytes - kernels < bank + 1024
    assert arithmetic.Held.kernel(ready.steps.held, CombinedKernel("bank", "c")).shape == (CHANNELS, CHANNELS, 3, 3)


def test_a_network_that_computes_from_the_size_takes_its_own_alone() -> None:
    network = Adapted(foreign.SamePadding(), Input(32, 32), tuple("abcd")).eval()
    ready = dacnn.pack(network, device="cpu")
    assert ready(images_of(2, 32, 32)).shape == (2, 4)
    with pytest.raises(ShapeError, match="images are 33x32, but 'SamePadding' computes from their size how it pads or pools"):
        ready(images_of(2, 33, 32))


# ---------------------------------------------------------------- compiled C


@pytest.mark.parametrize("winograd", [None, "init", "off"])
def test_compiled_c_gives_what_the_program_says_and_pytorch_what_it_does_not_take(small: Program, winograd: Any) -> None:
    ready = dacnn.pack(small, engine="c", device="cpu", winograd=winograd)
    images = images_of(5, 32, 32)
    assert error_of(ready(images), small, images) < TOLERANCE
    assert "compiled C" in ready.describe() and "pack" not in ready.describe()
    larger, floats = images_of(2, 40, 36), torch.randn(2, 3, 32, 32)
    for given in (larger, floats):
        assert error_of(ready(given), small, given) < TOLERANCE
    assert "1 pack" in ready.describe()


@pytest.mark.parametrize("engine", ["c", "auto"])
def test_compiled_c_holds_kernels_in_bfloat16_and_computes_in_float32(
    small: Program, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "seconds_of", lambda *calls: [1.0, 2.0])
    ready, whole = (dacnn.pack(small, engine=engine, device="cpu", dtype=dtype) for dtype in ("bfloat16", "float32"))  # type: ignore[arg-type]
    rounded = with_rounded_kernels(small)
    for given in (images_of(5, 32, 32), images_of(2, 40, 36), torch.randn(2, 3, 32, 32)):
        assert error_of(ready(given), rounded, given) < TOLERANCE
    assert ready.dtype == torch.bfloat16 and "kernels in bfloat16" in ready.describe()
    library, other = (one._library for one in (ready, whole))
    assert library is not None and other is not None and library.nbytes < other.nbytes


def test_compiled_c_without_winograd_holds_each_kernel_as_it_is_stored() -> None:
    program = lower(dacnn.create("dacnn5", width=64).eval())
    bytes_of = {way: dacnn.pack(program, engine="c", device="cpu", winograd=way).nbytes for way in ("file", "off")}  # type: ignore[arg-type]
    kernel = 64 * 64 * 9 * 4
    assert program.stored_bytes < bytes_of["off"] < program.stored_bytes + kernel
    # 36 numbers beside every nine
    assert bytes_of["file"] > bytes_of["off"] + 3 * kernel


def test_the_faster_way_is_taken(small: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    library = compiled(small, "file")
    monkeypatch.setattr(packed, "compiled", lambda program, *settings: library)
    for seconds, way in (([1.0, 2.0], "compiled C"), ([2.0, 1.0], "steps")):
        monkeypatch.setattr(packed, "seconds_of", lambda *calls, seconds=seconds: seconds)
        assert way in dacnn.pack(small, engine="auto", device="cpu").describe().splitlines()[1]


def test_a_trial_gives_the_seconds_of_each_call() -> None:
    short, long = seconds_of(lambda: None, lambda: time.sleep(0.002))
    assert 0 <= short < long


def test_without_a_compiler_c_is_refused_and_auto_is_pytorch(small: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(DeployError, match="no C compiler: looked for no-such-compiler"):
        dacnn.pack(small, engine="c", device="cpu")
    assert "compiled C" not in dacnn.pack(small, engine="auto", device="cpu").describe()
    # says that all went well, and writes nothing
    monkeypatch.setenv("CC", "true")
    assert "compiled C" not in dacnn.pack(small, engine="auto", device="cpu").describe()
    monkeypatch.setenv("CC", "'gcc")
    with pytest.raises(DeployError, match="which is no command"):
        dacnn.pack(small, engine="c", device="cpu")
