"""Training in integers: it computes what the integers compute, resumes bit for bit, and its ranges go into the export."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import dacnn
from dacnn.data.sources import load_test
from dacnn.deploy.integers.calibrate import calibrate
from dacnn.deploy.integers.quantize import quantize
from dacnn.deploy.integers.run import IntegerRun
from dacnn.deploy.lower import lower
from dacnn.errors import CheckpointError, ConfigError, Interrupted
from dacnn.networks.network import Network
from dacnn.training.listener import Listener
from dacnn.training.quantized import Quantized
from dacnn.training.run import data_of
from dacnn.training.train import configure
from onnx_programs import uint8_images
from reference import randomise

SMALL = {"width": 8, "epochs": 1, "batch_size": 128, "threads": 1, "precision": "float32"}
TUNED = {"quantize": "int8", "epochs": 2, "threads": 1, "checkpoint_minutes": 0.0}


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in floats."""
    out = tmp_path_factory.mktemp("runs") / "floats"
    dacnn.train("dacnn3", data="digits", out=out, **SMALL)
    return out


@pytest.fixture(scope="module")
def tuned(floats: Path) -> Path:
    """A run that goes on from there in integers."""
    out = floats.parent / "tuned"
    dacnn.train(weights=str(floats), out=out, **TUNED)
    return out


@pytest.mark.parametrize("name", ["dacnn7", "dacnn18"])
@pytest.mark.parametrize("share", [None, "template", "repeat"])
@torch.no_grad()
def test_what_is_trained_is_what_the_integers_compute(name: str, share: str | None) -> None:
    network = randomise(dacnn.create(name, width=8, num_classes=3, seed=0, share=share)).eval()
    images = torch.from_numpy(uint8_images(6, 32, 32))
    network.ranges = calibrate(lower(network), images)
    integers = IntegerRun(quantize(lower(network), network.ranges))(images)
    trained = Quantized(network)(network.normalize(images))
    # a sum that ends between two numbers may be rounded to either, and combined kernels are rounded once more
    error = float((trained - integers).norm() / integers.norm())
    assert error < (0.02 if share is None else 0.1)


def test_every_parameter_of_a_network_learns_through_the_rounding() -> None:
    network = randomise(dacnn.create("dacnn18-mix-reg", width=8, num_classes=3, seed=0, share="stage"))
    model = Quantized(network)
    images = torch.from_numpy(uint8_images(4, 32, 32))
    model.calibrate(images)
    model(network.normalize(images)).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_ranges_are_in_the_file_and_go_into_the_integers(tuned: Path) -> None:
    network: Network = dacnn.load(tuned)
    assert network.ranges is not None
    images = load_test(data_of(tuned, None), network.input, network.classes).gather(torch.arange(64))
    integers = IntegerRun(quantize(lower(network), network.ranges))(images)
    with torch.no_grad():
        logits = network(images)
    assert 0 < float((integers - logits).norm() / logits.norm()) < 0.1


def test_network_data_and_augmentation_are_those_of_the_run_it_goes_on_from(floats: Path, tuned: Path) -> None:
    config = configure(weights=str(floats), quantize="int8")
    assert (config.network.width, config.data.source, config.training.flip) == (8, "digits", False)
    assert config.training.epochs == 2 and dacnn.load(tuned).plan == dacnn.load(floats).plan


def test_a_run_in_integers_that_was_stopped_ends_with_the_same_bits(floats: Path, tuned: Path, tmp_path: Path) -> None:
    class Stops(Listener):
        def stepped(self, epoch: int, step: int, *rest: Any) -> None:
            if (epoch, step) == (1, 4):
                os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        dacnn.train(weights=str(floats), out=out, listener=Stops(), **TUNED)
    dacnn.train(out=out, resume=True)
    assert (out / "last.safetensors").read_bytes() == (tuned / "last.safetensors").read_bytes()


def test_weights_alone_are_a_start(floats: Path, tmp_path: Path) -> None:
    result = dacnn.train(
        weights=str(floats), recipe="digits", out=tmp_path / "on", epochs=1, lr=0.0, threads=1, precision="float32"
    )
    before = dacnn.load(floats).state_dict()
    after = dacnn.load(result.run / "last.safetensors").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("anchors."))
    assert dacnn.load(result.run).ranges is None


def test_integers_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name that run with --weights"):
        dacnn.train("dacnn3", data="digits", quantize="int8", out=tmp_path / "drawn")
    assert not (tmp_path / "drawn").exists()


def test_weights_that_are_none_are_refused_before_images_are_read(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, says in (("nowhere", "no such file"), ("text.safetensors", "not a readable .safetensors file")):
        with pytest.raises(CheckpointError, match=says):
            dacnn.train("dacnn3", data=str(tmp_path / "no-images"), weights=str(tmp_path / name), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_are_refused(floats: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave out settings of the network"):
        dacnn.train(weights=str(floats), out=tmp_path / "other", width=16, **TUNED)
