"""The loop: from a network and images to a trained network, on one process or many.

All randomness of a step is a function of the seed and the step's number, so a resumed training needs no generator's
past, and W processes of batch B draw what one process with W micro-batches of B draws.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from dacnn.config import TrainingConfig
from dacnn.data.batches import ahead, apply, draw
from dacnn.data.imageset import MemoryImages
from dacnn.data.sources import Splits
from dacnn.errors import ConfigError, DivergenceError
from dacnn.networks.classifier import Classifier
from dacnn.networks.network import Network
from dacnn.networks.normalize import Normalize
from dacnn.sharing.remake import remaking
from dacnn.sharing.winograd import by_winograd
from dacnn.training.evaluate import Evaluation, evaluate
from dacnn.training.precision import Execution
from dacnn.training.quantized import Quantized
from dacnn.training.recipe import make_optimizer, schedule, set_learning_rate
from dacnn.training.recompute import Segments, choose_segments
from dacnn.training.statistics import RunningStatistics

# N images of a micro-batch, H rows, W columns, C channels

# images from which the ranges of values are found
_CALIBRATION_IMAGES = 256
# a GPU is asked for the loss only every so many steps: asking makes it wait
_STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 50}


@dataclass(frozen=True)
class EpochRecord:
    """One line of `metrics.jsonl`."""

    epoch: int
    lr: float
    train_loss: float
    train_top1: float
    validation_loss: float | None
    validation_top1: float | None
    images_per_second: float
    seconds: float

    def to_table(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


class Loop:
    """A training in progress. Its attributes are all that a resume needs, beside the config."""

    def __init__(
        self, network: nn.Module, splits: Splits, config: TrainingConfig, accelerator: Accelerator, execution: Execution
    ) -> None:
        """Get ready.

        Args:
            network: From normalised floats, N x C x H x W, to logits; trained in place.
            splits: The images.
            config: The recipe.
            accelerator: Devices and processes.
            execution: Precision and memory format.

        Raises:
            ConfigError: A step takes more images than there are, or crops more than an image has, or segments are asked for
                of a network without a plan.
        """
        self.network, self.splits, self.config = network, splits, config
        self.accelerator, self.execution = accelerator, execution
        self.device = accelerator.device
        self.images_per_step = config.batch_size * config.accumulate * accelerator.num_processes
        self.steps = len(splits.train) // self.images_per_step
        if self.steps == 0:
            raise ConfigError(
                f"a step takes {self.images_per_step} images (training.batch_size x accumulate x processes), but "
                f"'{splits.name}' has {len(splits.train)} to train on: use a smaller batch size"
            )
        if config.crop >= min(splits.input.height, splits.input.width):
            raise ConfigError(
                f"training.crop is {config.crop}: expected less than the side of the images, {splits.input.height} pixels"
            )
        self.segments = self._choose_segments() if execution.recompute == "segments" else None
        network.to(self.device)
        # where they fit in memory they fit on a device; a step then waits for nothing
        self.train = splits.train.to(self.device) if isinstance(splits.train, MemoryImages) else splits.train
        self.normalize = Normalize(splits.input).to(self.device)
        self.optimizer = make_optimizer(network, config)
        # in integers, norms keep theirs
        self.statistics = RunningStatistics(network if config.quantize == "no" else nn.Identity())
        self.quantized = self._quantize()
        model = accelerator.prepare_model(self.quantized or network)
        self.model: nn.Module = self._compile(model) if execution.compiled else model
        # the colour that becomes 0 when it is normalised
        self.fill = torch.tensor([round(255 * mean) for mean in splits.input.mean], dtype=torch.uint8, device=self.device)
        self.epoch = 0
        self.step = 0
        self.best_top1 = -1.0
        # sums over this process's images of the epoch so far: loss, hits
        self.totals = torch.zeros(2, dtype=torch.float64, device=self.device)

    def _choose_segments(self) -> Segments:
        """Choose which blocks run again for the gradient, and tell the network."""
        if not isinstance(self.network, Network):
            raise ConfigError(
                f"training.recompute is 'segments': they are chosen by a network's plan, and {type(self.network).__name__} has "
                "none: use 'activations' or 'no'"
            )
        bytes_per_value = 2 if self.execution.precision == "bfloat16" else 4
        segments = choose_segments(self.network.plan, self.config.batch_size, bytes_per_value)
        self.network.segments = segments.lengths
        return segments

    def _quantize(self) -> Quantized | None:
        """What is trained in the network's place, where it learns to be rounded."""
        if self.config.quantize == "no":
            return None
        assert isinstance(self.network, Classifier)
        return Quantized(self.network.eval())

    def _compile(self, model: nn.Module) -> nn.Module:
        """Compile it; on a GPU its passes are recorded too: to launch hundreds of kernels takes as long as to run them."""
        # a gradient that is added to must not lie where the next pass is replayed, nor what a module of somebody else's keeps
        # from step to step; with several processes it was not tried
        passes = self.config.accumulate * self.accelerator.num_processes
        recorded = self.device.type == "cuda" and passes == 1 and isinstance(self.network, Network) and not self.quantized
        compiled: nn.Module = torch.compile(model, mode="reduce-overhead" if recorded else "default")  # type: ignore[assignment]
        return compiled

    def _calibrate(self) -> None:
        """Find the ranges anew: they move from epoch to epoch, and stay those of the last one."""
        if self.quantized is not None:
            some = torch.randperm(len(self.splits.train), generator=self._generator())[:_CALIBRATION_IMAGES]
            self.quantized.calibrate(self.train.gather(some))

    def prepare(self, images_nhwc: Tensor) -> Tensor:
        """Bring uint8 images to what the network takes, in the memory format of this training."""
        x: Tensor = self.normalize(images_nhwc)
        return x.contiguous(memory_format=self.execution.layout)

    def _generator(self, *position: int) -> torch.Generator:
        """The source of all random numbers of an epoch, or of a step."""
        digest = hashlib.sha256(repr((self.config.seed, *position)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def augment(self, images_nhwc: Tensor, step: int) -> Tensor:
        """Shift, mirror and blank out this process's images of a step of this epoch, uint8, N x H x W x C."""
        config, images = self.config, self.splits.input
        # drawn for the images of all processes
        draws = draw(
            self.images_per_step,
            height=images.height,
            width=images.width,
            crop=config.crop,
            flip=config.flip,
            cutout=config.cutout,
            generator=self._generator(self.epoch, step),
        )
        return apply(images_nhwc, draws[self._rank_slice()], self.fill)

    def _rank_slice(self) -> slice:
        """Which of a step's images are this process's."""
        mine = self.config.batch_size * self.config.accumulate
        return slice(self.accelerator.process_index * mine, (self.accelerator.process_index + 1) * mine)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's images and labels of every step that is left of the epoch."""
        order = torch.randperm(len(self.splits.train), generator=self._generator(self.epoch))
        indices = order[: self.steps * self.images_per_step].view(self.steps, -1)[self.step :, self._rank_slice()]
        if isinstance(self.train, MemoryImages):
            # all at once, since a GPU is waited for each time
            indices = indices.to(self.device)
        return ahead(self.train, indices, self.device)

    def train_epoch(self) -> Iterator[int]:
        """Train to the end of the epoch.

        Yields:
            After every step, its number; between two of them the state is whole.

        Raises:
            DivergenceError: The loss is no number any more.
        """
        self.model.train()
        if self.step == 0:
            self._calibrate()
        with contextlib.closing(self.batches()) as batches:  # type: ignore[type-var]
            for images, labels in batches:
                self._train_step(images, labels)
                self.step += 1
                yield self.step

    def _train_step(self, images_nhwc: Tensor, labels: Tensor) -> None:
        config = self.config
        total_steps = config.epochs * self.steps
        # the middle of the step: neither the first nor the last has a rate of 0
        set_learning_rate(self.optimizer, schedule((self.epoch * self.steps + self.step + 0.5) / total_steps, config))
        images_nhwc = self.augment(images_nhwc, self.step)
        passes = config.accumulate * self.accelerator.num_processes
        if passes > 1:
            self.statistics.begin_step()
        for index, (x, y) in enumerate(
            zip(*(torch.split(tensor, config.batch_size) for tensor in (images_nhwc, labels)), strict=True)
        ):
            last = index == config.accumulate - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                by = by_winograd(self.execution.convolution == "winograd")
                with self.execution.autocast(), remaking(self.execution.recompute != "no"), by:
                    logits = self.model(self.prepare(x))
                loss = F.cross_entropy(logits.float(), y, label_smoothing=config.label_smoothing)
                self.accelerator.backward(loss / config.accumulate)
            self.totals += torch.stack((loss.detach() * len(y), (logits.argmax(1) == y).sum()))
            if passes > 1:
                self.statistics.end_pass()
        if passes > 1:
            self.statistics.end_step(passes, self.reduce)
        if config.clip_norm is not None:
            # an anchor's gradient is the sum over its readers: the norm is taken of that sum
            nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def reduce(self, sums: Tensor) -> Tensor:
        """Add a tensor up over the processes."""
        return self.accelerator.reduce(sums, "sum")  # type: ignore[no-any-return]

    def look(self) -> tuple[float, float] | None:
        """Mean loss and accuracy of this process over the epoch so far; None where asking would make a GPU wait.

        Raises:
            DivergenceError: The loss is no number any more.
        """
        if self.step % _STEPS_BETWEEN_LOOKS[self.device.type] and self.step < self.steps:
            return None
        loss, hits = self.check()
        images = self.step * self.config.batch_size * self.config.accumulate
        return loss / images, hits / images

    def check(self, sums: Tensor | None = None) -> list[float]:
        """Make sure that the loss is still a number, so that no broken state is ever saved.

        Args:
            sums: Sums of the epoch; None: those of this process so far.

        Returns:
            The sums of loss and hits.

        Raises:
            DivergenceError: The loss is no number any more.
        """
        values: list[float] = (self.totals if sums is None else sums).tolist()
        if not math.isfinite(values[0]):
            raise self.diverged("loss", values[0])
        return values

    def diverged(self, what: str, value: float) -> DivergenceError:
        """The error that says that a loss is no number, and what to do."""
        return DivergenceError(
            f"the {what} is {value} in epoch {self.epoch + 1}, step {self.step} of {self.steps}: "
            f"lower --lr (now {self.config.lr}), lengthen training.warmup, or set training.clip_norm to 1"
        )

    def validate(self, tick: Callable[[int, int], None]) -> Evaluation | None:
        """Measure the network on the validation images; None where there are none."""
        if len(self.splits.validation) == 0:
            return None
        return evaluate(
            self.quantized or self.network,
            self.splits.validation,
            prepare=self.prepare,
            execution=self.execution,
            rank=self.accelerator.process_index,
            reduce=self.reduce,
            tick=tick,
        )

    def end_epoch(self, tick: Callable[[int, int], None], images_trained: int, seconds: float) -> tuple[EpochRecord, bool]:
        """Measure, record and go on to the next epoch.

        Args:
            tick: Called with the validation images done and to be done.
            images_trained: Images of this epoch in this sitting, over all processes.
            seconds: What they took.

        Returns:
            The record, and whether the network is the best so far.
        """
        loss, hits = self.check(self.reduce(self.totals))
        images = self.steps * self.images_per_step
        validation = self.validate(tick)
        if validation and not math.isfinite(validation.loss):
            raise self.diverged("validation loss", validation.loss)
        best = validation is not None and validation.top1 > self.best_top1
        if best and validation:
            self.best_top1 = validation.top1
        self.epoch += 1
        record = EpochRecord(
            epoch=self.epoch,
            lr=self.optimizer.param_groups[0]["lr"],
            train_loss=loss / images,
            train_top1=hits / images,
            validation_loss=validation.loss if validation else None,
            validation_top1=validation.top1 if validation else None,
            images_per_second=images_trained / seconds,
            seconds=seconds,
        )
        self.step = 0
        self.totals.zero_()
        return record, best
