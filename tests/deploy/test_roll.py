"""What rolling promises: the same numbers, and one step for a kernel that many layers read."""

from collections.abc import Sequence

import numpy as np
import pytest

from dacnn.deploy.cells import found_in, merged
from dacnn.deploy.program import (
    IMAGES,
    Activate,
    Add,
    Branch,
    CombinedKernel,
    Convolve,
    Flatten,
    GlobalAverage,
    Loop,
    MaxPool,
    Multiply,
    Normalize,
    Operation,
    Program,
    ScaleShift,
    StoredKernel,
)
from dacnn.deploy.roll import roll
from dacnn.networks.plan import Input
from interpreter import run

WIDTH = 4


class Writer:
    """Writes a flat program by hand; every layer's scale and shift are its own."""

    def __init__(self) -> None:
        self.steps: list[Operation] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.random = np.random.default_rng(0)
        self.value = IMAGES
        self.step(Normalize)
        self.conv("stem", 3)

    def tensor(self, name: str, *shape: int) -> str:
        if name not in self.tensors:
            self.tensors[name] = self.random.normal(size=shape).astype(np.float32)
        return name

    def step(self, kind: type, *arguments: object, **fields: object) -> str:
        out = f"x{len(self.steps)}"
        self.steps.append(kind(out, self.value, *arguments, **fields))
        self.value = out
        return out

    def conv(self, kernel: str, channels: int = WIDTH, side: int = 3) -> str:
        stored = StoredKernel(self.tensor(kernel, WIDTH, channels, side, side))
        return self.step(Convolve, stored, padding=(side // 2,) * 4)

    def layer(self, kernel: str = "shared", *, relu: bool = True) -> str:
        self.conv(kernel)
        number = len(self.steps)
        self.step(ScaleShift, self.tensor(f"norm{number}.scale", WIDTH), self.tensor(f"norm{number}.shift", WIDTH))
        return self.step(Activate) if relu else self.value

    def program(self) -> Program:
        self.step(GlobalAverage)
        self.step(Flatten)
        classes = tuple(map(str, range(WIDTH)))
        return Program("by hand", Input(16, 16), classes, tuple(self.steps), self.value, self.tensors)


def loops(program: Program) -> list[Loop]:
    """The loops of a program, outer ones before those in them."""

    def found(steps: Sequence[object]) -> list[Loop]:
        inner = [step for step in steps if isinstance(step, Loop | Branch)]
        return [loop for step in inner for loop in [*([step] if isinstance(step, Loop) else []), *found(step.steps)]]

    return found(program.steps)


def assert_rolls(program: Program, *, reads: int = 1) -> Program:
    """Rolling changes no bit and no kernel, and leaves so many steps that read the shared one."""
    rolled = roll(program)
    images = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert np.array_equal(run(rolled, images), run(program, images))
    assert rolled.readers()["shared"] == reads
    assert rolled.tensors["shared"] is program.tensors["shared"]
    assert rolled.stored_bytes == program.stored_bytes
    return rolled


@pytest.mark.parametrize("readers", [2, 3, 7])
def test_layers_in_a_row_become_one_loop(readers: int) -> None:
    writer = Writer()
    for _ in range(readers):
        writer.layer()
    (loop,) = loops(assert_rolls(writer.program()))
    assert loop.counts == (readers,)
    assert not any(isinstance(step, Branch) for step in loop.steps)


def test_one_reader_is_no_loop() -> None:
    writer = Writer()
    writer.layer()
    assert loops(assert_rolls(writer.program())) == []


def test_stages_become_loops_around_loops_of_their_depths() -> None:
    writer = Writer()
    for depth in (1, 3, 2):
        for _ in range(depth):
            writer.layer()
        writer.step(MaxPool)
    outer, inner = loops(assert_rolls(writer.program()))
    assert outer.counts == (3,) and inner.counts == (1, 3, 2)
    assert [type(step) for step in outer.steps] == [Loop, MaxPool]
    assert [type(step) for step in inner.steps] == [Convolve, ScaleShift, Activate]


def test_a_last_stage_without_pooling_passes_it_over() -> None:
    writer = Writer()
    for depth in (2, 2, 1):
        for _ in range(depth):
            writer.layer()
        if depth == 2:
            writer.step(MaxPool)
    outer, inner = loops(assert_rolls(writer.program()))
    assert inner.counts == (2, 2, 1)
    branch = outer.steps[1]
    assert isinstance(branch, Branch) and branch.runs == (True, True, False)


def test_both_layers_of_a_residual_block_are_turns_of_one_loop() -> None:
    writer = Writer()
    for _ in range(3):
        before = writer.value
        writer.layer()
        writer.layer(relu=False)
        writer.step(Add, before)
        writer.step(Activate)
    (loop,) = loops(assert_rolls(writer.program()))
    assert loop.counts == (6,)
    kept, added = (step for step in loop.steps if isinstance(step, Branch))
    assert kept.runs == (True, False) * 3 and kept.steps == ()
    assert added.runs == (False, True) * 3 and isinstance(added.steps[0], Add)


def test_an_operand_of_the_same_turn_is_not_carried() -> None:
    writer = Writer()
    for _ in range(3):
        before = writer.conv("shared")
        writer.conv(f"own{len(writer.steps)}", side=1)
        writer.step(Multiply, before)
    (loop,) = loops(assert_rolls(writer.program()))
    assert len(loop.carried) == 1


def test_a_value_of_within_the_loop_that_is_needed_behind_it_is_carried_out() -> None:
    writer = Writer()
    values = [writer.layer() for _ in range(4)]
    writer.conv("other")
    writer.step(Add, values[1])
    writer.step(Add, values[2])
    rolled = assert_rolls(writer.program())
    assert {one.name for one in loops(rolled)[0].carried} >= {values[1], values[2]}


def test_a_value_of_before_the_loop_is_read_in_every_turn() -> None:
    writer = Writer()
    first = writer.value
    for _ in range(3):
        writer.layer()
        writer.step(Add, first)
    assert len(loops(assert_rolls(writer.program()))[0].carried) == 1


def test_what_cannot_be_kept_one_after_the_other_stays_flat() -> None:
    writer = Writer()
    values = [writer.layer() for _ in range(2)]
    # each turn needs what two turns ago made: two values are kept at a time for one place
    for _ in range(4):
        writer.layer()
        writer.step(Add, values[-2])
        values.append(writer.value)
    assert loops(assert_rolls(writer.program(), reads=6)) == []


def test_what_one_turn_alone_does_is_a_branch_without_rows() -> None:
    writer = Writer()
    for turn in range(4):
        writer.layer(relu=False)
        if turn == 1:
            writer.conv("other")
        writer.step(Activate)
    rolled = assert_rolls(writer.program())
    (loop,) = loops(rolled)
    (branch,) = (step for step in loop.steps if isinstance(step, Branch))
    assert branch.runs == (False, True, False, False)
    assert rolled.readers()["other"] == 1


def test_rows_of_a_branch_are_numbered_by_the_turns_in_which_it_runs() -> None:
    writer = Writer()
    for turn in range(5):
        writer.layer()
        if turn in (1, 2):
            writer.conv(f"own{turn}", side=1)
        writer.step(Activate, "tanh")
    rolled = assert_rolls(writer.program())
    (branch,) = (step for step in loops(rolled)[0].steps if isinstance(step, Branch))
    (convolution,) = branch.steps
    assert rolled.tensors[convolution.kernel.tensor.table].shape == (2, WIDTH, WIDTH, 1, 1)  # type: ignore[union-attr]


def test_coefficients_of_a_bank_become_rows_and_the_bank_stays() -> None:
    writer = Writer()
    bank = writer.tensor("shared", 2, WIDTH, WIDTH, 3, 3)
    for turn in range(3):
        writer.step(Convolve, CombinedKernel(bank, writer.tensor(f"own{turn}.coefficients", 2)), padding=(1, 1, 1, 1))
    rolled = assert_rolls(writer.program())
    assert rolled.tensors["loop1.coefficients"].shape == (3, 2)


def test_readers_of_other_strides_are_other_steps() -> None:
    writer = Writer()
    shared = StoredKernel(writer.tensor("shared", WIDTH, WIDTH, 3, 3))
    for stride in (1, 2, 1, 2):
        writer.step(Convolve, shared, stride=(stride, stride), padding=(1, 1, 1, 1))
    assert_rolls(writer.program(), reads=2)


def test_a_program_is_printed_with_its_loops() -> None:
    writer = Writer()
    for _ in range(2):
        writer.layer()
    text = str(roll(writer.program()))
    assert "loop 2 times" in text and "* loop1.scale[turn] + loop1.shift[turn]" in text


def test_merging_keeps_every_row_in_order() -> None:
    rows = ["abd", "acd", "d", "abcd", "e"]
    cell, places = merged(rows)
    assert ["".join(cell[place] for place in mine) for mine in places] == rows
    assert all(mine == sorted(set(mine)) for mine in places)
    assert len(cell) == 5


def test_as_much_as_stands_in_the_cell_is_found() -> None:
    assert found_in("abcd", "acx") == [0, 2]
    assert found_in("abcd", "x") == []
