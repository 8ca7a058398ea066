"""Convolutions that follow one another are one call, and give what they give one by one."""

import functools

import pytest
import torch

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


@pytest.mark.parametrize("name", ["dacnn14", "dacnn18"])
def test_without_torchscript_the_same_bits_come_and_the_description_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(function: object) -> None:
        raise RuntimeError("there is no TorchScript any more")

    program = program_of(name)
    images = [images_of(1), images_of(3), images_of(2, 48)]
    expected = [dacnn.pack(program, device="cpu")(one) for one in images]
    monkeypatch.setattr(torch.jit, "script", refused)
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
