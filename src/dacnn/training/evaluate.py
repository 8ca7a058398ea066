"""Every test image exactly once, however many processes share the work."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dacnn.config import DataConfig
from dacnn.data.batches import ahead
from dacnn.data.imageset import ImageSet
from dacnn.data.sources import load_test
from dacnn.errors import DataError
from dacnn.networks.classifier import Classifier, as_network, evaluating
from dacnn.training.precision import Execution

# N images, K classes


@dataclass(frozen=True)
class Evaluation:
    """What a network makes of a set of images.

    Attributes:
        images: How many.
        top1: Share of them whose first guess is right.
        top5: Share of them with the right class among the first five guesses (or all, where there are fewer classes).
        loss: Mean cross-entropy in nats.
        confusion: Counts, shape (K, K): row the true class, column the first guess.
        classes: Names of the classes.
    """

    images: int
    top1: float
    top5: float
    loss: float
    confusion: Tensor
    classes: tuple[str, ...]

    def per_class(self) -> list[dict[str, Any]]:
        """For every class: its images, recall (share of them found) and precision (share of such guesses that are right)."""
        right, true, guessed = self.confusion.diag(), self.confusion.sum(1), self.confusion.sum(0)
        return [
            {
                "class": name,
                "images": int(true[k]),
                "recall": float(right[k] / true[k]) if true[k] else None,
                "precision": float(right[k] / guessed[k]) if guessed[k] else None,
            }
            for k, name in enumerate(self.classes)
        ]


@torch.no_grad()
def evaluate(
    network: nn.Module,
    images: ImageSet | str | Path,
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
    execution: Execution | None = None,
    batch_size: int = 256,
    rank: int = 0,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure a network on a set of images.

    Args:
        network: From images to logits; left in the mode it is in now, but run in evaluation mode.
        images: The images, or a data set by its name or place, whose test images a network of this library is measured on.
        prepare: From uint8 N x H x W x C to what the network takes; None: the network takes that itself.
        execution: Precision and processes; None: float32, one process.
        batch_size: Images of one forward pass.
        rank: Which of the processes this is.
        reduce: Adds a tensor up over the processes.
        tick: Called with the images done and to be done by this process.

    Returns:
        The measurement, the same on every process.

    Raises:
        DataError: There are no images, or the data set cannot be read, or has other classes.
        UnknownNameError: There is no such data set.
        ConfigError: A data set is named, but this is no network of this library.

    Example::

        print(dacnn.evaluate(dacnn.load("runs/a"), "cifar10").top1)
    """
    if isinstance(images, str | Path):
        of = as_network(network)
        images = load_test(DataConfig(source=str(images)), of.input, of.classes)
    if len(images) == 0:
        raise DataError("no images to evaluate: expected 1 or more")
    classes = images.classes
    device = next(network.parameters()).device
    processes = execution.processes if execution else 1
    mine = torch.arange(len(images))[rank::processes]
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.float64, device=device)
    # top-5 hits, loss
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    done = 0
    with evaluating(network):
        for batch, labels in ahead(images, torch.split(mine, batch_size) if len(mine) else (), device):
            inputs = prepare(batch) if prepare else batch
            with execution.autocast() if execution else nullcontext():
                logits = network(inputs)
            logits = logits.float()
            guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
            confusion.view(-1).index_add_(
                0, labels * len(classes) + guesses[:, 0], torch.ones_like(labels, dtype=torch.float64)
            )
            sums[0] += (guesses == labels[:, None]).sum()
            sums[1] += F.cross_entropy(logits, labels, reduction="sum").double()
            done += len(labels)
            tick(done, len(mine))
    confusion, sums = reduce(confusion).cpu(), reduce(sums).cpu()
    total = len(images)
    return Evaluation(
        images=total,
        top1=float(confusion.diag().sum()) / total,
        top5=float(sums[0]) / total,
        loss=float(sums[1]) / total,
        confusion=confusion.long(),
        classes=network.classes if isinstance(network, Classifier) else classes,
    )
