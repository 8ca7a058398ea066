"""A foreign module is a network like one of ours: it takes images, gives logits, and says what does not fit."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import dacnn
from dacnn.errors import ConfigError, ShapeError
from dacnn.networks.adapted import Adapted
from dacnn.networks.plan import Input
from factories import GROUPS, GivesDict, GivesObject, GivesTuple, Stateful, Views, chain, lazy
from reference import one_thread  # noqa: F401  (a fixture)

TEN = tuple("0123456789")
GREY = Input(32, 32, 1, (0.3,), (0.7,))
COLOUR = Input(24, 32, 3, (0.3, 0.4, 0.5), (0.7, 0.6, 0.5))


def images(input: Input, count: int = 3) -> Tensor:
    size = (count, input.height, input.width, input.channels)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(images_nhwc: Tensor, input: Input) -> Tensor:
    """By the definition of a mean and a standard deviation."""
    mean, std = torch.tensor(input.mean), torch.tensor(input.std)
    x = ((images_nhwc / 255 - mean) / std).permute(0, 3, 1, 2)
    # with strides of this order, even where one channel leaves a choice
    return x.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("input", [GREY, COLOUR], ids=["grey", "colour"])
def test_uint8_images_reach_the_module_normalised(input: Input) -> None:
    module = chain(10, input.channels).eval()
    network = Adapted(module, input, TEN)
    # a multiply-add against a subtraction and a division
    torch.testing.assert_close(network(images(input)), module(normalised(images(input), input)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [GivesObject, GivesTuple])
def test_logits_are_found_in_an_object_and_in_a_tuple(kind: type[nn.Module]) -> None:
    module = kind().eval()
    x = normalised(images(GREY), GREY)
    assert torch.equal(Adapted(module, GREY, TEN)(x), module.chain(x))


def test_a_list_is_taken_like_a_tuple() -> None:
    module = nn.Conv2d(1, 10, 32)
    module.register_forward_hook(lambda module, inputs, y: [y.flatten(1), None])
    assert Adapted(module, GREY, TEN)(images(GREY)).shape == (3, 10)


def test_what_gives_no_logits_is_refused_with_what_it_gives() -> None:
    with pytest.raises(ShapeError, match=r"GivesDict gives dict for 3 images: expected logits of shape \(3, 10\)"):
        Adapted(GivesDict(), GREY, TEN)(images(GREY))
    with pytest.raises(ShapeError, match=r"gives \(3, 7\) for 3 images: expected logits of shape \(3, 10\), one for each"):
        Adapted(chain(7), GREY, TEN)(images(GREY))


def test_images_of_other_channels_are_refused() -> None:
    network = Adapted(chain(), GREY, TEN)
    with pytest.raises(ShapeError, match="expected N x 1 x H x W"):
        network(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ShapeError, match="N x H x W x 1"):
        network(images(COLOUR))


@pytest.mark.parametrize("channels", [1, 3])
def test_view_works_on_uint8_images_of_one_channel_and_of_three(channels: int) -> None:
    """Of one channel, both orders are the same memory, and only the strides tell a convolution which is meant."""
    input = Input(32, 32, channels, (0.5,) * channels, (0.25,) * channels)
    network = Adapted(Views(10, channels), input, TEN)
    assert network(images(input)).shape == (3, 10)
    x = network.normalize(images(input)).contiguous()
    assert network(x).shape == (3, 10)


def test_trying_out_leaves_modes_parameters_and_statistics_as_they_were() -> None:
    module = chain().train()
    module.b.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    network = Adapted(module, GREY, TEN)
    assert network.try_out() is network
    assert [part.training for part in module.modules()] == modes and not all(modes)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


def test_trying_out_gives_lazy_layers_their_shapes() -> None:
    module = lazy(10)
    Adapted(module, GREY, TEN).try_out()
    assert tuple(module[0].weight.shape) == (8, 1, 3, 3)
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())


def test_what_does_not_run_says_on_what_and_where_in_the_users_code() -> None:
    with pytest.raises(ShapeError, match="Sequential does not run on images of N x 1 x 32 x 32: RuntimeError: ") as caught:
        Adapted(chain(10, 3), GREY, TEN).try_out()
    assert "\n" not in str(caught.value)

    class Wrong(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("where")

    with pytest.raises(ShapeError, match=r"KeyError: 'where' \(test_adapted.py, line \d+\)"):
        Adapted(Wrong(2, 2), GREY, TEN).try_out()
    with pytest.raises(ConfigError, match="Flatten has no parameters"):
        Adapted(nn.Flatten(), GREY, TEN).try_out()


def test_a_converted_module_tells_its_owner_and_who_reads_what() -> None:
    plain = Adapted(chain(), GREY, TEN)
    assert plain.owner is None and dict(plain.conversion.groups) == {}
    converted, mapping = dacnn.anchor(chain(), regulator="depthwise")
    network = Adapted(converted, GREY, TEN)
    assert network.owner is not None and list(network.owner.readers().values()) == [list(GROUPS["all"][0])]
    assert network.conversion == dataclasses.replace(mapping, refused={}), "what was refused is not known any more"


def test_normalisation_follows_where_the_network_goes_and_is_in_no_state_dict() -> None:
    network = Adapted(chain(), GREY, TEN)
    assert all(name.startswith("module.") for name in network.state_dict())
    double = Adapted(chain(), GREY, TEN).double()
    assert double.logits(torch.zeros(2, 1, 32, 32, dtype=torch.float64)).dtype == torch.float64


def test_a_copy_that_shares_nothing_with_its_original() -> None:
    network = Adapted(dacnn.anchor(chain())[0], GREY, TEN).eval()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert network(images(GREY)).abs().sum() > 0 and twin(images(GREY)).abs().sum() == 0


def test_a_state_that_is_no_tensor_is_no_obstacle_to_running() -> None:
    assert Adapted(Stateful(), GREY, TEN).try_out()(images(GREY)).shape == (3, 10)


def test_a_module_that_its_owner_shared_and_trained_ships_like_a_network_of_ours(tmp_path: Path) -> None:
    shared, _ = dacnn.anchor(chain(10, 3), "all")
    optimizer = torch.optim.SGD(shared.parameters(), 0.01)
    for _ in range(3):
        F.cross_entropy(shared(torch.randn(8, 3, 24, 32)), torch.arange(8)).backward()
        optimizer.step()
    network = dacnn.adapt(shared, COLOUR, 10).eval()
    assert network.module is shared and network.classes == TEN
    expected = shared(normalised(images(COLOUR), COLOUR))
    torch.testing.assert_close(network(images(COLOUR)), expected, rtol=1e-4, atol=1e-5)
    counts = dacnn.count(network)
    assert counts.stored_parameters < counts.used_parameters
    assert dacnn.export(network, "onnx", tmp_path / "net.onnx").parity.top1_agreement == 1
    assert dacnn.audit(tmp_path / "net.onnx", against=None).single
    torch.testing.assert_close(dacnn.pack(network)(images(COLOUR)), expected, rtol=1e-3, atol=1e-4)
    dacnn.save(network, tmp_path / "net.safetensors")
    again = dacnn.load(tmp_path / "net.safetensors", into=chain(10, 3))
    assert isinstance(again, Adapted) and again.input == COLOUR and again.classes == TEN
    assert torch.equal(again(images(COLOUR)), network(images(COLOUR)))


def test_adapting_keeps_the_mode_and_takes_names() -> None:
    network = dacnn.adapt(chain(2, 3).train(), COLOUR, ["cat", "dog"])
    assert network.module.training and network.classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("chain.py", COLOUR, 10), "module is a str: expected an nn.Module"),
        ((dacnn.create("dacnn3", width=8), COLOUR, 10), "module is a network already"),
        ((chain(10, 3), (24, 32), 10), r"input is a tuple: expected dacnn.Input\(height, width"),
        ((chain(10, 3), COLOUR, 0), "classes is 0: expected names, .* or a number from 1"),
        ((chain(10, 3), COLOUR, "cat"), "classes is 'cat': expected names"),
        ((chain(10, 3), COLOUR, {"cat", "dog"}), "classes is .*: expected names, each once and in order"),
        ((chain(10, 3), COLOUR, ["cat"] * 10), "expected names, each once and in order"),
        ((chain(10, 3), COLOUR, None), "classes is None: expected names"),
        ((chain(10, 3).to("meta"), COLOUR, 10), "is on the device 'meta', where it has no values"),
        ((chain(10, 3), COLOUR, 7), r"gives \(2, 10\) for 2 images: expected logits of shape \(2, 7\)"),
        ((chain(10, 3), GREY, 10), "Sequential does not run on images of N x 1 x 32 x 32"),
    ],
    ids=range(11),
)
def test_what_cannot_be_adapted_is_refused(given: tuple[Any, Any, Any], says: str) -> None:
    with pytest.raises((ConfigError, ShapeError), match=says):
        dacnn.adapt(*given)


@pytest.mark.parametrize("found", [nn.Conv2d(3, 3, 3), "runs/a", None], ids=["module", "str", "None"])
def test_what_takes_a_network_says_so_of_anything_else(found: Any, tmp_path: Path) -> None:
    picture = tmp_path / "black.png"
    Image.new("RGB", (32, 32)).save(picture)
    got = rf"got {type(found).__name__}: expected a network"
    for call in (
        dacnn.count,
        dacnn.pack,
        dacnn.alike,
        dacnn.fold,
        dacnn.rival,
        dacnn.predict_training_memory,
        dacnn.measure_training_memory,
        lambda found: dacnn.predict(found, picture),
        lambda found: dacnn.evaluate(found, "digits"),
        lambda found: dacnn.export(found, "onnx", tmp_path / "net.onnx"),
    ):
        with pytest.raises(ConfigError, match=got):
            call(found)
    assert [path.name for path in tmp_path.iterdir()] == ["black.png"]
