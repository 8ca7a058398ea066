"""Groups of layers as a user lists them: by names and patterns."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from dacnn.errors import PlanError

# of how many layers a message gives the names: an error is a line
_SHOWN = 12


def match_groups(groups: Iterable[str | Sequence[str]], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Find the layers that every group names.

    Args:
        groups: Names of layers or patterns of them (`*` and `?` stand for any characters), in a list or joined by `+`.
        names: All layers, in order.

    Returns:
        For every group, under the name `group0`, `group1`, ..., its layers in order.

    Raises:
        PlanError: A group is empty, names no layer, or takes a layer of another group.
    """
    found: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for index, group in enumerate(groups):
        patterns = group.split("+") if isinstance(group, str) else list(group)
        if not all(patterns) or not patterns:
            raise PlanError(f"group {index} is {group!r}: expected names of layers or patterns such as 'stage1.*'")
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                known = ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} layers)" if len(names) > _SHOWN else "")
                raise PlanError(f"group {index} names '{pattern}', which is no layer: expected some of {known}")
        found[f"group{index}"] = tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
        for name in found[f"group{index}"]:
            if name in owner:
                raise PlanError(f"layer '{name}' is in {owner[name]} and in group{index}: leave it in one of them")
            owner[name] = f"group{index}"
    return found
