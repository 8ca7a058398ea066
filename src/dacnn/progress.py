"""What a person sees while something long is running: bars on standard error, a line for every epoch."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dacnn.config import Config
from dacnn.training.listener import Listener
from dacnn.training.loop import EpochRecord

console = Console(stderr=True)


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show one bar.

    Args:
        what: What is being done.

    Yields:
        A function that takes how many are done and how many there are.
    """
    if not console.is_terminal:
        yield lambda done, total: None
        return
    with Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task(what, total=None)

        def tick(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield tick


class TrainingProgress(Listener):
    """Shows a training: loss, accuracy, images per second, time left; and a line for every epoch."""

    def __init__(self) -> None:
        """Begin to show."""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task("data", total=None, state="")
        self.epochs = 0
        self.images_per_step = 0
        # a log file has no use for bars: it gets the lines alone
        self.shown = console.is_terminal
        if self.shown:
            self.progress.start()

    def close(self) -> None:
        """Clear the bars away."""
        if self.shown:
            self.progress.stop()

    def log(self, line: str) -> None:
        """Print a remark."""
        self.progress.console.print(line, highlight=False, soft_wrap=True)

    def loading(self, what: str, done: int, total: int) -> None:
        """Show how far decoding is."""
        self.progress.update(self.task, description=what, completed=done, total=total, state=f"{done:,}/{total:,}")

    def started(self, config: Config, epoch: int, steps: int, images_per_step: int) -> None:
        """Show the bar of the whole training."""
        self.epochs, self.images_per_step = config.training.epochs, images_per_step
        # a new task, so that the time left is reckoned from steps alone
        self.progress.remove_task(self.task)
        self.task = self.progress.add_task("training", total=self.epochs * steps, completed=epoch * steps, state="")

    def stepped(self, epoch: int, step: int, steps: int, loss: float, top1: float) -> None:
        """Show loss, accuracy and speed."""
        speed = self.progress.tasks[0].speed
        images = f"  {speed * self.images_per_step:,.0f} images/s" if speed else ""
        state = f"loss {loss:.3f}  top-1 {top1:.2%}{images}"
        self.progress.update(
            self.task, description=f"epoch {epoch}/{self.epochs}", completed=(epoch - 1) * steps + step, state=state
        )

    def evaluating(self, done: int, total: int) -> None:
        """Show how far the validation is."""
        self.progress.update(self.task, state=f"validation {done:,}/{total:,}")

    def epoch_ended(self, record: EpochRecord, best: bool) -> None:
        """Print the epoch's line."""
        validation = "" if record.validation_top1 is None else f"  validation top-1 {record.validation_top1:.2%}{' *' * best}"
        self.log(
            f"epoch {record.epoch:>3}/{self.epochs}  loss {record.train_loss:.4f}  top-1 {record.train_top1:.2%}{validation}  "
            f"{record.images_per_second:,.0f} images/s"
        )
