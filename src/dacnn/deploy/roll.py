"""Equal runs of steps rolled into loops, so that one step reads a kernel that many read.

The steps from one reader of a kernel to the next are the turns of a loop. What only some turns do stands in branches; where
that is the end of a turn, as the pooling behind a stage is, it becomes the body of a loop around the loop instead.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dacnn.deploy.cells import Cell, Kept, kept_operands, moves_of, step_signature
from dacnn.deploy.program import (
    Branch,
    Carried,
    KernelStep,
    Loop,
    Operation,
    Program,
    Reference,
    Row,
    ScaleShift,
    Step,
    operands,
    references,
)


def roll(program: Program) -> Program:
    """Roll a flat program.

    Args:
        program: A program without loops.

    Returns:
        A program that computes the same, in which as few steps as could be found read each shared kernel. Tensors that
        became rows of tables are there as tables only.
    """
    flat = tuple(program.operations())
    names = Counter(tensor for step in flat for tensor in references(step))
    roller = _Roller(dict(program.tensors), {name for name, times in names.items() if times > 1})
    steps = roller.rolled(flat, {program.result})
    named = {_tensor_name(reference) for step in _operations(steps) for reference in references(step)}
    tensors = {name: tensor for name, tensor in roller.tensors.items() if name in named}
    return dataclasses.replace(program, steps=tuple(steps), tensors=tensors)


def _operations(steps: Iterable[Step]) -> Iterator[Operation]:
    for step in steps:
        if isinstance(step, Loop | Branch):
            yield from _operations(step.steps)
        else:
            yield step


def _tensor_name(reference: Reference) -> str:
    return reference.table if isinstance(reference, Row) else reference


@dataclass
class _Roller:
    tensors: dict[str, NDArray[np.float32]]
    shared: set[Reference]
    loops: int = 0

    def agree(self, reference: Reference) -> object:
        """What tensors of one place agree in: the shared ones are the same, the others are of one shape."""
        return reference if reference in self.shared or isinstance(reference, Row) else self.tensors[reference].shape

    def rolled(self, steps: Sequence[Operation], needed: Collection[str]) -> list[Step]:
        """Roll some steps.

        Args:
            steps: The steps.
            needed: Values of theirs that others need.

        Returns:
            What takes their place.
        """
        sites: dict[object, list[int]] = {}
        for index, step in enumerate(steps):
            if isinstance(step, KernelStep) and step.kernel.tensor in self.shared:
                sites.setdefault(step_signature(step, self.agree), []).append(index)
        for readers in sorted(sites.values(), key=lambda readers: (-len(readers), readers[0])):
            found = self._loop(steps, readers, needed) if len(readers) > 1 else None
            if found is not None:
                loop, end = found
                before, behind = steps[: readers[0]], steps[end:]
                used = {name for step in (*steps[readers[0] :],) for name in operands(step)}
                return [*self.rolled(before, {*needed, *used}), loop, *self.rolled(behind, needed)]
        return list(steps)

    def _loop(self, steps: Sequence[Operation], readers: list[int], needed: Collection[str]) -> tuple[Loop, int] | None:
        """Roll the steps from the first of some readers on; None where that cannot be done. With it, where the rest begins."""
        begin = readers[0]
        start = steps[begin].x
        moves = list(moves_of(steps[begin:], start))
        heads = [index for index, move in enumerate(moves) if any(move.step is steps[reader] for reader in readers)]
        # a turn begins where the value is taken up that its reader takes
        heads = [head - (head > 0 and moves[head - 1].step is None) for head in heads]
        segments = [moves[head:end] for head, end in itertools.pairwise(heads)]
        cell = Cell.of(segments, moves[heads[-1] :], start, self.agree)
        end = begin + sum(move.step is not None for _, move in cell.in_order())
        kept = kept_operands(cell, {*needed, *(name for step in steps[end:] for name in operands(step))})
        if kept is None:
            return None
        self.loops += 1
        return _Writer(cell, kept, self, f"loop{self.loops}").loop(), end


@dataclass
class _Writer:
    """Writes the loop of a cell.

    Attributes:
        names: Of the running value at the beginning of every place, as far as it is written.
        now: What is kept, by the place or the value that it is for.
    """

    cell: Cell
    kept: dict[int | str, Kept]
    roller: _Roller
    prefix: str
    values: int = 0
    names: dict[int, str] = field(default_factory=dict)
    now: dict[int | str | None, str] = field(default_factory=dict)

    def loop(self) -> Loop:
        """The loop, or the loop around it where the end of a turn is left out of most."""
        cell, split = self.cell, self._split()
        carried = {key for key, kept in self.kept.items() if kept.carried}
        turns = [turn for turn in range(cell.turns) if split < len(cell.places) and self._ends(split, turn)]
        if not turns:
            return self._enclosed((cell.turns,), carried, lambda: self._body(0, len(cell.places), range(cell.turns)))
        # the turns of the loop around: each ends with one of these, or with the last of all
        ends = turns if turns[-1] == cell.turns - 1 else [*turns, cell.turns - 1]
        counts = tuple(end - begin for begin, end in itertools.pairwise([-1, *ends]))

        def around() -> list[Step]:
            inner = self._enclosed(counts, carried, lambda: self._body(0, split, range(cell.turns)))
            return [inner, *self._body(split, len(cell.places), ends)]

        return self._enclosed((len(ends),), {key for key in carried if self._crosses(key, ends)}, around)

    def _crosses(self, key: int | str, ends: Sequence[int]) -> bool:
        """Whether something is kept for `key` beyond the end of a group of turns."""
        kept = {turn for turns in self.kept[key].captures.values() for turn in turns}
        wanted = [self.cell.turns] if isinstance(key, str) else [turn for turn, runs in enumerate(self.cell.runs(key)) if runs]
        since = {turn: max((other for other in kept if other <= turn), default=-1) for turn in wanted}
        return any(since[turn] <= end < turn for turn in wanted for end in ends)

    def _split(self) -> int:
        """The first place of those that end a group of turns; the number of places where there are no such groups."""
        count = len(self.cell.places)
        for split in range(1, count):
            ends = {turn for turn in range(self.cell.turns) if self._ends(split, turn)}
            if len(ends) < self.cell.turns and len(ends | {self.cell.turns - 1}) > 1 and self._can_split(split):
                return split
        return count

    def _ends(self, split: int, turn: int) -> bool:
        """Whether a turn runs any of the places from `split` on."""
        return any(moves[turn] is not None for moves in self.cell.places[split:])

    def _can_split(self, split: int) -> bool:
        """Whether nothing of a turn's beginning is needed at its end but what is carried."""
        return all(
            kept.local is None or kept.local >= split or (isinstance(place, int) and place < split)
            for place, kept in self.kept.items()
        )

    def _enclosed(self, counts: tuple[int, ...], keys: Collection[int | str], body: Callable[[], list[Step]]) -> Loop:
        """A loop around what `body` writes, and the names behind it.

        Args:
            counts: Of the loop.
            keys: For what something is carried besides the running value.
            body: Writes the steps.
        """
        running = self.names.get(0, self.cell.start)
        # what is first kept inside begins as anything
        starts: dict[int | str | None, str] = {None: running}
        for key in sorted(keys, key=str):
            starts[key] = self.now.get(key, self.kept[key].start or running)
        inside: dict[int | str | None, str] = {key: self._new() for key in starts}
        if not self.names:
            # behind the outermost loop, values have the names that they have in the flat program
            inside |= {key: key for key in starts if isinstance(key, str)}
            inside[None] = self.cell.result
        self._enter(inside)
        steps = tuple(body())
        last: dict[int | str | None, str] = {**self.now, None: self.names[max(self.names)]}
        self._enter(inside)
        return Loop(counts, tuple(Carried(inside[key], starts[key], last[key]) for key in starts), steps)

    def _enter(self, carried: dict[int | str | None, str]) -> None:
        """Name what is carried, at the beginning of a turn or behind the last one."""
        self.names = {0: carried[None]}
        self.now = {key: name for key, name in carried.items() if key is not None}

    def _new(self) -> str:
        self.values += 1
        return f"{self.prefix}.v{self.values}"

    def _body(self, begin: int, end: int, turns: Sequence[int]) -> list[Step]:
        """The places from `begin` to before `end`, in these turns of the cell."""
        self.names[begin] = self.names[max(self.names)]
        steps: list[Step] = []
        place = begin
        while place < end:
            steps += self._captures(place, turns)
            runs = self._runs(place, turns)
            alike = place + 1
            while alike < end and self._runs(alike, turns) == runs and not (all(runs) or self._is_seen(alike)):
                alike += 1
            inner = list(self._steps(range(place, alike), turns))
            value = self.names[alike]
            if all(runs):
                steps += inner
            else:
                self.names[alike] = self._new()
                # a loop in a branch is entered once
                rolled = self.roller.rolled(inner, {value}) if sum(runs) == 1 else inner
                steps.append(Branch(self.names[alike], runs, value, self.names[place], tuple(rolled)))
            place = alike
        return steps

    def _runs(self, place: int, turns: Sequence[int]) -> tuple[bool, ...]:
        runs = self.cell.runs(place)
        return tuple(runs[turn] for turn in turns)

    def _is_seen(self, place: int) -> bool:
        """Whether the running value at the beginning of a place is needed elsewhere than there."""
        return any(kept.local == place or place in kept.captures for kept in self.kept.values())

    def _captures(self, place: int, turns: Sequence[int]) -> Iterator[Branch]:
        """Keep the running value for others, in the turns in which they will need it."""
        for key, kept in self.kept.items():
            runs = tuple(turn in kept.captures.get(place, ()) for turn in turns)
            if kept.carried and all(runs):
                self.now[key] = self.names[place]
            elif kept.carried and any(runs):
                name = self._new()
                yield Branch(name, runs, self.names[place], self.now[key], ())
                self.now[key] = name

    def _steps(self, places: range, turns: Sequence[int]) -> Iterator[Operation]:
        """What the places do where they run."""
        for place in places:
            made = [move for turn in turns if (move := self.cell.places[place][turn]) is not None]
            other = self._other(place) if made[0].other is not None else None
            if made[0].step is None:
                assert other is not None
                self.names[place + 1] = other
                continue
            self.names[place + 1] = self._new()
            values = {"out": self.names[place + 1], made[0].slot: self.names[place]}
            if other is not None:
                values["y" if made[0].slot == "x" else "x"] = other
            yield self._with_rows([move.step for move in made if move.step is not None], values)

    def _other(self, place: int) -> str:
        kept = self.kept[place]
        return kept.outside or (self.names[kept.local] if kept.local is not None else self.now[place])

    def _with_rows(self, steps: Sequence[Operation], values: dict[str, str]) -> Operation:
        """One step in place of several, its values named anew, its tensors rows of tables where theirs differ."""
        changes: dict[str, Any] = {**values}
        if isinstance(steps[0], KernelStep):
            kernels = [step.kernel for step in steps if isinstance(step, KernelStep)]
            names = [item.name for item in dataclasses.fields(kernels[0])]
            rows = {name: self._row([getattr(kernel, name) for kernel in kernels]) for name in names}
            changes["kernel"] = dataclasses.replace(kernels[0], **rows)
        elif isinstance(steps[0], ScaleShift):
            changes |= {name: self._row([getattr(step, name) for step in steps]) for name in ("scale", "shift")}
        changed: Operation = dataclasses.replace(steps[0], **changes)
        return changed

    def _row(self, tensors: list[Any]) -> Any:
        if len(set(tensors)) == 1:
            # in a table of one row it would be the same; what is no row can be read in any turn
            return tensors[0]
        table = f"{self.prefix}.{_common_end(tensors)}"
        number = 1
        while table in self.roller.tensors:
            number += 1
            table = f"{self.prefix}.{_common_end(tensors)}{number}"
        self.roller.tensors[table] = np.stack([self.roller.tensors[name] for name in tensors])
        return Row(table)


def _common_end(names: Sequence[str]) -> str:
    """The last words that some dotted names have in common."""
    words = [name.split(".") for name in names]
    common: list[str] = []
    while all(len(word) > len(common) and word[-1 - len(common)] == words[0][-1 - len(common)] for word in words):
        common.insert(0, words[0][-1 - len(common)])
    return ".".join(word for word in common if not word.isdigit()) or "table"
