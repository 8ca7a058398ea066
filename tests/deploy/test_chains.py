"""Convolutions that follow one another are one call, and give what they give one by one."""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import dacnn
from dacnn.deploy.lower import lower
from dacnn.deploy.packed import Packed
from dacnn.deploy.packing import chains, onednn
from dacnn.deploy.program import Program

pytestmark = pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch packs no kernels")


def images_of(count: int, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def program_of(name: str) -> Program:
    return lower(dacnn.create(name, width=8, seed=0).eval())


def chains_of(packed: Packed) -> list[chains.Chain]:
    return [call for call, *_ in packed.steps._calls if isinstance(call, chains.Chain)]


def test_this_pytorch_goes_through_links_without_python() -> None:
    packed = dacnn.pack(program_of("dacnn5"), device="cpu")
    assert chains.is_interpreted() and "one by one" not in packed.describe()


def test_a_plain_network_is_one_chain_between_the_image_and_the_average() -> None:
    [chain] = chains_of(dacnn.pack(program_of("dacnn14"), device="cpu"))
    kinds = [type(link).__name__ for link in chain._links]
    assert kinds.count("Convolution") == 13 and kinds.count("MaxPooling") == 5


def test_a_value_that_a_shortcut_reads_too_ends_a_chain() -> None:
    packed = dacnn.pack(program_of("dacnn18"), device="cpu")
    lengths = [len(chain._links) for chain in chains_of(packed)]
    assert max(lengths) == 2 and len(lengths) > 8


def refused(function: object) -> None:
    raise RuntimeError("there is no TorchScript any more")


# PYTORCH_JIT=0 switches it off: what is scripted stays as it is
@pytest.mark.parametrize("script", [refused, lambda function: function], ids=["gone", "off"])
@pytest.mark.parametrize("name", ["dacnn14", "dacnn18"])
def test_without_torchscript_the_same_bits_come_and_the_description_says_so(
    name: str, script: Callable[[object], object], monkeypatch: pytest.MonkeyPatch
) -> None:

    program = program_of(name)
    images = [images_of(1), images_of(3), images_of(2, 48)]
    expected = [dacnn.pack(program, device="cpu")(one) for one in images]
    monkeypatch.setattr(torch.jit, "script", script)
    # what it answers is remembered
    monkeypatch.setattr(chains, "_interpreter", functools.cache(chains._interpreter.__wrapped__))
    packed = dacnn.pack(program, device="cpu")
    assert not chains.is_interpreted()
    assert "called one by one, since this PyTorch has no TorchScript" in packed.describe()
    assert all(packed(one).equal(want) for one, want in zip(images, expected, strict=True))


def test_packs_that_are_not_kept_are_made_once_a_call_for_all_layers_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_layout", functools.cache(lambda kernel, dtype, geometry, images, threads: f"for {images[2]}"))
    monkeypatch.setattr(onednn, "_saving", lambda *asked: 0.0)
    program = program_of("dacnn14")
    packed = dacnn.pack(program, device="cpu")
    made = []
    reorder = onednn.reorder
    monkeypatch.setattr(
        onednn, "reorder", lambda plain, geometry, images: made.append(images[2]) or reorder(plain, geometry, images)
    )
    packed(images_of(1))
    # the stem's, and the anchor's for 32x32, are kept
    assert made == [16, 8, 4, 2]


def test_a_network_serves_while_another_one_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = dacnn.pack(program_of("dacnn5"), device="cpu")
    expected = packed(images_of(2))
    # a flag of the process, while any thread is in `torch.export`: it has TorchScript functions called as Python
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    assert torch.compiler.is_exporting() and packed(images_of(2)).equal(expected)


def test_batches_of_all_sizes_share_what_is_handed_over() -> None:
    packed = dacnn.pack(program_of("dacnn14"), device="cpu")
    for count in range(1, 9):
        packed(images_of(count))
    [chain] = chains_of(packed)
    assert len(chain._known) == 8 and len(chain._held) < 4


def test_what_a_chain_is_given_is_let_go_as_soon_as_it_is_read() -> None:
    # four values of 2 MiB one after the other, of which two live at a time
    layers = nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    packed = dacnn.pack(dacnn.adapt(module, dacnn.Input(256, 256), 5).eval(), device="cpu")
    images = images_of(1, 256)
    packed(images)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        packed(images)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert 4 * 2**20 <= max(live) < 5 * 2**20
