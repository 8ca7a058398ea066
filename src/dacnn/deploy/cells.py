"""What the runs of steps between the readers of one kernel have in common: the cell of a loop.

A cell is a row of places. In each turn of the loop, the step of a place runs or is passed over. All steps work on one running
value; what a step takes besides it is a value of outside, of the same turn, or one that was kept for it some turns ago.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from dacnn.deploy.program import Add, Operation, Reference, operands, references

# a place and a turn: the running value as it is when that step begins
Moment = tuple[int, int]


@dataclass(frozen=True)
class Move:
    """What becomes of the running value: a step takes it, or, where there is none, another value takes its place.

    Attributes:
        step: The step.
        slot: Which operand of the step it is, `x` or `y`.
        other: The other operand of the step, or the value that takes its place.
        out: The running value behind the move.
    """

    step: Operation | None
    slot: str
    other: str | None
    out: str

    def signature(self, shapes: Callable[[Reference], object]) -> tuple[Any, ...]:
        """What moves that can stand in one place agree in.

        Args:
            shapes: What tensors that can be rows of one table agree in.
        """
        if self.step is None:
            return ("take up",)
        slot = "" if isinstance(self.step, Add) else self.slot
        return (slot, *step_signature(self.step, shapes))


def step_signature(step: Operation, shapes: Callable[[Reference], object]) -> tuple[Any, ...]:
    """What steps that differ in their values and in the numbers of their tensors alone agree in; see `Move.signature`."""
    fields = {item.name: getattr(step, item.name) for item in dataclasses.fields(step)}
    tensors = tuple(map(shapes, references(step)))
    kernel = fields.pop("kernel", None)
    settings = tuple((name, value) for name, value in fields.items() if name not in ("out", "x", "y", "scale", "shift"))
    given = tuple(fields.get(name) is not None for name in ("scale", "shift"))
    return (type(step), type(kernel), tensors, given, settings)


def moves_of(steps: Sequence[Operation], start: str) -> Iterator[Move]:
    """Follow the running value through some steps.

    Args:
        steps: The steps.
        start: The running value before them.
    """
    running = start
    for step in steps:
        taken = operands(step)
        if running not in taken:
            running = taken[0]
            yield Move(None, "", running, running)
        slot = "x" if taken[0] == running else "y"
        other = None if len(taken) == 1 else taken[1] if slot == "x" else taken[0]
        yield Move(step, slot, other, step.out)
        running = step.out


def merged(rows: Sequence[Sequence[Any]]) -> tuple[list[Any], list[list[int]]]:
    """The shortest sequence found that holds each of some sequences, with gaps.

    Args:
        rows: Sequences of things that can be compared.

    Returns:
        The sequence, and for each of `rows` the places of its items in it.
    """
    # places are known by numbers that stay when others are put between them
    cell: list[tuple[int, Any]] = []
    members: list[list[int]] = []
    for row in rows:
        pairs = _common([item for _, item in cell], row)
        woven: list[tuple[int, Any]] = []
        mine: list[int] = []
        at = here = 0
        for place, index in [*pairs, (len(cell), len(row))]:
            woven += cell[at:place]
            for item in row[here:index]:
                mine.append(sum(map(len, members)) + len(mine) + 1)
                woven.append((mine[-1], item))
            if place < len(cell):
                woven.append(cell[place])
                mine.append(cell[place][0])
            at, here = place + 1, index + 1
        cell, members = woven, [*members, mine]
    places = {number: place for place, (number, _) in enumerate(cell)}
    return [item for _, item in cell], [[places[number] for number in row] for row in members]


def _common(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[int, int]]:
    """A longest common subsequence, as pairs of indices."""
    rows, columns = len(first), len(second)
    length = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            same = first[i] == second[j]
            length[i][j] = length[i + 1][j + 1] + 1 if same else max(length[i + 1][j], length[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < rows and j < columns:
        if first[i] == second[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif length[i + 1][j] >= length[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def found_in(cell: Sequence[Any], row: Sequence[Any]) -> list[int]:
    """Places of as much of the beginning of a sequence as stands in the cell, in order."""
    places: list[int] = []
    for item in row:
        begin = places[-1] + 1 if places else 0
        place = next((place for place in range(begin, len(cell)) if cell[place] == item), None)
        if place is None:
            break
        places.append(place)
    return places


@dataclass(frozen=True)
class Cell:
    """The places of a loop and what stands in them, turn by turn.

    Attributes:
        places: For every place its moves, one for each turn; None where it is passed over.
        start: The running value before the first turn.
    """

    places: tuple[tuple[Move | None, ...], ...]
    start: str

    @classmethod
    def of(
        cls, segments: Sequence[Sequence[Move]], tail: Sequence[Move], start: str, shapes: Callable[[Reference], object]
    ) -> Self:
        """Find what the turns have in common.

        Args:
            segments: The moves of every turn but the last.
            tail: Moves that begin with those of the last turn.
            start: The running value before.
            shapes: What tensors that can be rows of one table agree in.

        Returns:
            The cell; its last turn makes as many moves of `tail` as other turns make.
        """
        signatures = [[move.signature(shapes) for move in segment] for segment in segments]
        sequence, turns = merged(signatures)
        last = found_in(sequence, [move.signature(shapes) for move in tail])
        while tail[len(last) - 1].step is None:
            last.pop()
        made = [dict(zip(places, moves, strict=False)) for places, moves in zip([*turns, last], [*segments, tail], strict=True)]
        return cls(tuple(tuple(turn.get(place) for turn in made) for place in range(len(sequence))), start)

    @property
    def turns(self) -> int:
        """How many there are."""
        return len(self.places[0])

    def runs(self, place: int) -> tuple[bool, ...]:
        """In which turns the step of a place runs."""
        return tuple(move is not None for move in self.places[place])

    def in_order(self) -> Iterator[tuple[Moment, Move]]:
        """The moves that are made, each with its turn and place."""
        for turn in range(self.turns):
            for place, moves in enumerate(self.places):
                move = moves[turn]
                if move is not None:
                    yield (turn, place), move

    @property
    def result(self) -> str:
        """The running value behind the last turn."""
        return [move.out for _, move in self.in_order()][-1]


@dataclass(frozen=True)
class Kept:
    """Where a place finds the operand that is not the running value.

    Attributes:
        outside: A value of outside the loop that it is in every turn.
        local: The place at whose beginning the running value was it, in the same turn.
        start: What is kept before the first turn: a value of outside, or None where the first is kept inside.
        captures: For every place, the turns in which the running value is kept when the place begins.
    """

    outside: str | None = None
    local: int | None = None
    start: str | None = None
    captures: dict[int, set[int]] = dataclasses.field(default_factory=dict)

    @property
    def carried(self) -> bool:
        """Whether it goes from turn to turn."""
        return self.outside is None and self.local is None


def kept_operands(cell: Cell, needed: Collection[str]) -> dict[int | str, Kept] | None:
    """Find out what has to be kept from one turn for another.

    Args:
        cell: The cell.
        needed: Values that are needed behind the loop.

    Returns:
        For every place with an operand besides the running value, and for every needed value that is not the last running
        value, where it is found. None: what one place needs is not always there one after the other.
    """
    moves = list(cell.in_order())
    # the running value is a value until the next move takes it
    latest: dict[str, Moment] = {cell.start: moves[0][0]}
    for (_, move), (moment, _) in itertools.pairwise(moves):
        latest.setdefault(move.out, moment)
    wanted: dict[int | str, list[tuple[Moment, str]]] = {}
    for (turn, place), move in moves:
        if move.other is not None:
            wanted.setdefault(place, []).append(((turn, place), move.other))
    made = {move.out for _, move in moves if move.step is not None}
    for value in sorted(needed):
        if value in made and value != cell.result:
            wanted[value] = [((cell.turns, 0), value)]
    found = {key: _kept(demands, latest, made) for key, demands in wanted.items()}
    return None if None in found.values() else {key: kept for key, kept in found.items() if kept is not None}


def _kept(demands: Sequence[tuple[Moment, str]], latest: dict[str, Moment], made: Collection[str]) -> Kept | None:
    values = {value for _, value in demands}
    if len(values) == 1 and not values & set(made):
        return Kept(outside=values.pop())
    here = {latest[value][1] if latest.get(value, (-1, -1))[0] == moment[0] else None for moment, value in demands}
    if len(here) == 1 and None not in here:
        return Kept(local=here.pop())
    captures: dict[int, set[int]] = {}
    start = held = None
    free = (-1, -1)
    for moment, value in demands:
        if value != held:
            if value not in latest:
                if held is not None:
                    return None
                start = value
            else:
                turn, place = latest[value]
                # what was kept before must have been used by then
                if (turn, place) <= free:
                    return None
                captures.setdefault(place, set()).add(turn)
            held = value
        free = moment
    return Kept(start=start, captures=captures)
