"""An evaluation sees every image once and agrees with scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, log_loss, precision_score, recall_score, top_k_accuracy_score
from torch import Tensor, nn

import dacnn
from dacnn.config import DataConfig, TrainingConfig
from dacnn.data.imageset import MemoryImages
from dacnn.data.sources import load_test
from dacnn.errors import DataError, ShapeError, UnknownNameError
from dacnn.training.evaluate import evaluate
from dacnn.training.precision import choose

CLASSES = tuple("abcdefg")


@pytest.fixture
def images() -> MemoryImages:
    """37 images, a number that neither batches nor processes divide."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (37, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return MemoryImages(pixels, torch.randint(0, 7, (37,), generator=generator), CLASSES)


@pytest.fixture
def network() -> nn.Module:
    return dacnn.create("dacnn3", width=8, num_classes=7, seed=0).eval()


def test_the_measurements_are_those_of_scikit_learn(images: MemoryImages, network: nn.Module) -> None:
    with torch.no_grad():
        probabilities = network(images.images_nhwc).double().softmax(1).numpy()
    true, guesses, labels = images.labels.numpy(), probabilities.argmax(1), np.arange(7)
    result = evaluate(network, images, batch_size=5)
    assert result.images == 37
    assert result.top1 == pytest.approx((true == guesses).mean())
    assert result.top5 == pytest.approx(top_k_accuracy_score(true, probabilities, k=5, labels=labels))
    assert result.loss == pytest.approx(log_loss(true, probabilities, labels=labels), rel=1e-5)
    assert (result.confusion.numpy() == confusion_matrix(true, guesses, labels=labels)).all()
    rows = result.per_class()
    assert [row["recall"] for row in rows] == pytest.approx(
        recall_score(true, guesses, labels=labels, average=None, zero_division=0)
    )
    # a class that is never guessed has no precision; scikit-learn says 0
    measured = [row["precision"] or 0.0 for row in rows]
    assert measured == pytest.approx(precision_score(true, guesses, labels=labels, average=None, zero_division=0))


@pytest.mark.parametrize("processes", [2, 3, 40])
def test_processes_together_see_every_image_once(processes: int, images: MemoryImages, network: nn.Module) -> None:
    execution = choose(TrainingConfig(precision="float32"), "cpu", processes)
    sums: list[Tensor] = []

    def collect(part: Tensor) -> Tensor:
        sums.append(part.clone())
        return part

    for rank in range(processes):
        evaluate(network, images, execution=execution, rank=rank, reduce=collect)
    whole = evaluate(network, images)
    # each process reduces the confusion matrix, then the sums
    assert torch.equal(sum(sums[0::2]), whole.confusion.double())
    assert float(sum(part[1] for part in sums[1::2])) / 37 == pytest.approx(whole.loss, rel=1e-5)


def test_a_network_stays_in_its_mode_and_its_statistics_are_left_alone(images: MemoryImages, network: nn.Module) -> None:
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    evaluate(network, images)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_each_part_stays_in_its_own_mode_also_where_an_image_does_not_fit(images: MemoryImages, network: nn.Module) -> None:
    network.train()
    frozen = next(part for part in network.modules() if isinstance(part, nn.BatchNorm2d)).eval()
    evaluate(network, images)
    assert network.training and not frozen.training
    with pytest.raises(ShapeError):
        evaluate(network, MemoryImages(images.images_nhwc[..., :1], images.labels, CLASSES))
    assert network.training and not frozen.training


def test_fewer_than_five_classes_are_all_among_the_first_five(images: MemoryImages) -> None:
    few = MemoryImages(images.images_nhwc, images.labels % 3, ("a", "b", "c"))
    assert evaluate(dacnn.create("dacnn3", width=8, num_classes=3, seed=0), few).top5 == 1.0


def test_no_images_are_an_error(images: MemoryImages, network: nn.Module) -> None:
    with pytest.raises(DataError, match="no images to evaluate"):
        evaluate(network, MemoryImages(images.images_nhwc[:0], images.labels[:0], CLASSES))


def test_a_data_set_is_named_by_its_name() -> None:
    network = dacnn.create("dacnn3", width=8, in_channels=1, seed=0)
    found = dacnn.evaluate(network, "digits")
    images = load_test(DataConfig("digits"), network.input, network.classes)
    assert found.images == len(images) == int(found.confusion.sum())
    assert found.top1 == evaluate(network, images).top1
    with pytest.raises(UnknownNameError, match="unknown data set 'cifar11'"):
        dacnn.evaluate(network, "cifar11")
