"""How the bench runs: checked before any work starts."""

from dataclasses import dataclass

from dacnn.bench.contenders import chosen
from dacnn.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """How the bench runs.

    Attributes:
        threads: Threads of each contender.
        batches: Batch sizes.
        rounds: How often each contender has its turn.
        only: Names of the contenders; none: all.
        into: FILE.py:factory of the layers, for a network of somebody else's.
    """

    threads: int = 1
    batches: tuple[int, ...] = (1, 32)
    rounds: int = 7
    only: tuple[str, ...] = ()
    into: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: One is less than 1, or there is no batch size.
            UnknownNameError: There is no contender of such a name.
        """
        for name in ("threads", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}: expected 1 or more")
        if not self.batches or min(self.batches) < 1:
            raise ConfigError(f"--batch is {' '.join(map(str, self.batches)) or 'empty'}: expected sizes of 1 or more")
        chosen(self.only)
