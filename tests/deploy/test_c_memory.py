"""Values that live at the same time never overlap, and no more memory is taken than a network must have."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import dacnn
from dacnn.deploy.c.memory import Use, plan
from dacnn.deploy.c.translate import translate
from dacnn.deploy.lower import lower
from dacnn.deploy.program import IMAGES
from dacnn.deploy.shapes import live_bytes
from reference import one_thread  # noqa: F401  (a fixture)


def overlaps(uses: list[Use], sizes: dict[str, int], outside: dict[str, int], align: int = 1) -> list[tuple[str, str]]:
    """Pairs of values that lie in one place while both are needed, found by writing every value into its place in turn."""
    memory = plan(uses, sizes, outside, align)
    owner: dict[int, str] = {}
    found = []
    for use in uses:
        for name in use.takes:
            if name not in outside:
                places = range(memory.offsets[name], memory.offsets[name] + sizes[name])
                found += [(name, owner.get(place, "nothing")) for place in places if owner.get(place) != name]
        if use.gives not in outside:
            assert memory.offsets[use.gives] % align == 0
            assert memory.offsets[use.gives] + sizes[use.gives] <= memory.size
            written = set(range(memory.offsets[use.gives], memory.offsets[use.gives] + sizes[use.gives]))
            # while it writes, what it takes must not change, but for what it may write over
            kept = [name for name in use.takes if name not in outside and name not in use.over]
            found += [(use.gives, name) for name in kept if {place for place in written if owner.get(place) == name}]
            owner |= dict.fromkeys(written, use.gives)
    return found


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 10**6), align=st.sampled_from([1, 4, 16]))
def test_values_that_are_needed_at_the_same_time_never_overlap(seed: int, align: int) -> None:
    draw = random.Random(seed)
    names, uses, sizes = [IMAGES], [], {}
    for index in range(draw.randint(1, 20)):
        takes = tuple(draw.sample(names, min(len(names), draw.randint(1, 2))))
        name = f"x{index}"
        sizes[name] = draw.randint(1, 40)
        over = tuple(taken for taken in takes if sizes.get(taken) == sizes[name])
        uses.append(Use(takes, name, over))
        names.append(name)
    assert overlaps(uses, sizes, {IMAGES: 0, names[-1]: -1}, align) == []


def test_a_chain_alternates_between_two_places() -> None:
    uses = [Use((f"x{index}",), f"x{index + 1}") for index in range(6)]
    assert plan(uses, {f"x{index}": 10 for index in range(7)}, {"x0": 0}).size == 20


def test_what_works_in_place_needs_one_place() -> None:
    uses = [Use((f"x{index}",), f"x{index + 1}", (f"x{index}",)) for index in range(6)]
    memory = plan(uses, {f"x{index}": 10 for index in range(7)}, {"x0": 0})
    assert memory.size == 10 and set(memory.offsets.values()) == {0}


def test_what_is_read_again_is_not_written_over() -> None:
    uses = [Use(("x0",), "x1"), Use(("x1",), "x2", ("x1",)), Use(("x2", "x1"), "x3")]
    memory = plan(uses, {"x1": 10, "x2": 10, "x3": 1}, {"x0": 0, "x3": -1})
    assert memory.size == 20 and memory.offsets["x3"] == -1


@pytest.mark.parametrize("name", ["dacnn14", "dacnn18-mix", "dacnn34"])
def test_a_network_takes_no_more_than_its_largest_live_set(name: str) -> None:
    program = lower(dacnn.create(name, width=16))
    calls = translate(program)
    uses = [use for use in (row.use() for row in calls.rows) if use is not None]
    assert 4 * plan(uses, calls.sizes, {IMAGES: 0, calls.result: -1}).size <= live_bytes(program)
