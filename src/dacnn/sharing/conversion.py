"""Which layers of a foreign module read which kernel: pure data, as the plan of a network is."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dacnn.errors import PlanError
from dacnn.sharing.regulators import check_regulator


@dataclass(frozen=True)
class Conversion:
    """Which layers of a module read which kernel: what `anchor` did, or would do.

    Attributes:
        groups: For every shared kernel, the layers that read it.
        refused: Layers that cannot share, and why.
        regulator: What stands behind every reader.
        regulator_rank: Its rank, where it is low-rank.
        templates: Templates of every group's bank; None: the group reads one kernel.
    """

    groups: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str] = field(default_factory=dict)
    regulator: str | None = None
    regulator_rank: int | None = None
    templates: int | None = None

    def __post_init__(self) -> None:
        """Check what needs no module."""
        if self.regulator is not None:
            check_regulator(self.regulator, self.regulator_rank)
        elif self.regulator_rank is not None:
            raise PlanError(f"regulator_rank is {self.regulator_rank}, but there is no regulator: name one, or leave it out")
        if self.regulator_rank is not None and self.regulator_rank < 1:
            raise PlanError(f"regulator_rank is {self.regulator_rank}: expected 1 or more")
        if self.templates is not None and self.templates < 1:
            raise PlanError(f"templates is {self.templates}: expected 1 or more")
        for reader, count in Counter(reader for readers in self.groups.values() for reader in readers).items():
            if count > 1:
                raise PlanError(f"layer '{reader}' reads {count} kernels: expected each layer once")
        for name, readers in self.groups.items():
            if not name or "." in name:
                raise PlanError(f"a kernel is named '{name}': expected a name without dots")
            if self.templates is not None and len(readers) < self.templates:
                raise PlanError(
                    f"{name} has {len(readers)} layers for {self.templates} templates: expected at most as many templates"
                )

    def to_table(self) -> dict[str, Any]:
        """The fields that are set, as plain values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "Conversion":
        """Read what `to_table` wrote.

        Args:
            table: The fields.

        Returns:
            The conversion.

        Raises:
            PlanError: The table is no conversion.
        """
        try:
            groups = {str(name): tuple(map(str, readers)) for name, readers in table["groups"].items()}
            refused = {str(name): str(why) for name, why in table.get("refused", {}).items()}
            return cls(**{**table, "groups": groups, "refused": refused})
        except (TypeError, AttributeError, KeyError) as error:
            raise PlanError(f"not a conversion: {type(error).__name__}: {error}") from None
