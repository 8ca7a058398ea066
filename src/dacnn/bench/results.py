"""What the bench found: a row a contender and side."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from dacnn.bench.contenders import Contender, Side


@dataclass(frozen=True)
class Latency:
    """Seconds for a batch.

    Attributes:
        batch: Images of it.
        seconds: Median over the rounds, of the median of a round.
        low_seconds: The fastest round's median.
        high_seconds: The slowest round's median.
        peak_share: Multiply-adds a second, as the network is counted, over those of the measured peak in float32.
    """

    batch: int
    seconds: float
    low_seconds: float
    high_seconds: float
    peak_share: float

    @classmethod
    def of(cls, batch: int, rounds: Sequence[Sequence[float]], macs: int, peak_macs_per_second: float) -> Self:
        """Sum up the rounds.

        Args:
            batch: Images of a batch.
            rounds: For every round, the seconds of each run.
            macs: Multiply-adds of one image.
            peak_macs_per_second: The measured peak.

        Returns:
            The latency.
        """
        medians = [statistics.median(seconds) for seconds in rounds]
        middle = statistics.median(medians)
        return cls(batch, middle, min(medians), max(medians), batch * macs / middle / peak_macs_per_second)


@dataclass(frozen=True)
class Row:
    """What one contender does with one side.

    Attributes:
        contender: The back end.
        side: The shared network, or its unshared twin.
        version: Of the back end's package.
        failure: Why there are no figures; None where there are.
        file_bytes: Of all files that it loads.
        memory_bytes: Private anonymous memory that loading and one run add to a fresh process; None where the system does
            not tell.
        kernel_copies: How often the kernel that most layers of the shared network read is in the memory of that process; None
            where it was not found in any known form, or cannot be looked for.
        top1_agreement: Share of the images whose first guess is the reference's.
        max_error: Largest difference of a logit from the reference's, over the reference's largest logit.
        latencies: One for each batch size.
    """

    contender: Contender
    side: Side
    version: str = ""
    failure: str | None = None
    file_bytes: int | None = None
    memory_bytes: int | None = None
    kernel_copies: int | None = None
    top1_agreement: float | None = None
    max_error: float | None = None
    latencies: tuple[Latency, ...] = ()

    def to_table(self) -> dict[str, Any]:
        """The fields as plain values."""
        table = {name: value for name, value in vars(self).items() if name not in {"contender", "latencies"}}
        about = {"name": self.contender.name, "about": self.contender.about, "takes": self.contender.takes}
        return about | table | {"latencies": [asdict(latency) for latency in self.latencies]}


@dataclass(frozen=True)
class Bench:
    """A whole run of the bench.

    Attributes:
        network: What it is called.
        macs: Multiply-adds of one image.
        cpu: The CPU it ran on.
        threads: Threads that each contender had.
        rounds: How often each had its turn.
        batches: Batch sizes.
        images: How many images were classified for the errors.
        source: Where they are from.
        peak_macs_per_second: Of float32 matrices, at so many threads, in the same rounds.
        twin: Why there is no twin; None where there is one.
        rows: The shared network's first.
    """

    network: str
    macs: int
    cpu: str
    threads: int
    rounds: int
    batches: tuple[int, ...]
    images: int
    source: str
    peak_macs_per_second: float
    twin: str | None
    rows: tuple[Row, ...]

    def to_table(self) -> dict[str, Any]:
        """The fields as plain values."""
        return vars(self) | {"rows": [row.to_table() for row in self.rows]}
