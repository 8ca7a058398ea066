"""Who wants to know how a training goes."""

from dacnn.config import Config
from dacnn.training.loop import EpochRecord


class Listener:
    """Told how a training goes. This one says nothing: subclass it."""

    def log(self, line: str) -> None:
        """A remark."""

    def loading(self, what: str, done: int, total: int) -> None:
        """So many images are decoded."""

    def started(self, config: Config, epoch: int, steps: int, images_per_step: int) -> None:
        """The training begins, or goes on, behind `epoch` epochs of `steps` steps."""

    def stepped(self, epoch: int, step: int, steps: int, loss: float, top1: float) -> None:
        """A step is done; loss and accuracy are means over the epoch so far."""

    def evaluating(self, done: int, total: int) -> None:
        """So many validation images are done."""

    def epoch_ended(self, record: EpochRecord, best: bool) -> None:
        """An epoch is done; `best`: the best on the validation images so far."""
