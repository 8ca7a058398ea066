"""Loops and branches written as ONNX give what the interpreter gives, and hold each kernel once, one node reading it."""

import numpy as np
import pytest

from dacnn.deploy.onnx.model import to_onnx_loop
from dacnn.deploy.program import (
    Activate,
    Add,
    Branch,
    Carried,
    CombinedKernel,
    Convolve,
    GlobalAverage,
    Loop,
    MaxPool,
    Multiply,
    Program,
    Reference,
    RepeatedKernel,
    Row,
    ScaleShift,
    Step,
    StoredKernel,
)
from onnx_programs import C, check, drawn, graphs, optimised_bytes, program, stored_arrays

# C channels, O output channels, I input channels, L turns

SAME = (1, 1, 1, 1)
FORMS = ("small", "fast")


def layer(x: str, out: str, kernel: Reference = "k") -> tuple[Step, ...]:
    """A convolution with a kernel for all turns, and each turn's scale and shift."""
    return (
        Convolve(f"{out}.c", x, StoredKernel(kernel), padding=SAME),
        ScaleShift(f"{out}.s", f"{out}.c", Row("scale"), Row("shift")),
        Activate(out, f"{out}.s"),
    )


def tables(turns: int) -> dict[str, np.ndarray]:
    return {"k": drawn(C, C, 3, 3), "scale": 1 + drawn(turns, C), "shift": drawn(turns, C, seed=1)}


NESTED = program(
    Loop(
        (3,),
        (Carried("y", "x", "p"),),
        (Loop((2, 1, 3), (Carried("z", "y", "r"),), layer("z", "r")), MaxPool("p", "z", (2, 2), (1, 1))),
    ),
    **tables(6),
)
RESIDUAL = program(
    Loop(
        (2,),
        (Carried("y", "x", "p"),),
        (
            Loop(
                (4, 2),
                (Carried("z", "y", "a"), Carried("held", "y", "now")),
                (
                    Branch("now", (True, False) * 3, "z", "held", ()),
                    *layer("z", "r"),
                    Branch("a", (False, True) * 3, "sum", "r", (Add("sum", "r", "now"),)),
                ),
            ),
            Branch("p", (True, False), "half", "z", (MaxPool("half", "z"),)),
        ),
    ),
    **tables(6),
)
PROGRAMS: dict[str, Program] = {
    "one loop": program(Loop((3,), (Carried("y", "x", "r"),), layer("y", "r")), **tables(3)),
    "a loop of one turn": program(Loop((1,), (Carried("y", "x", "r"),), layer("y", "r")), **tables(1)),
    "a loop of none": program(Loop((0,), (Carried("y", "x", "r"),), layer("y", "r", "k")), **tables(1)),
    "nested": NESTED,
    "residual": RESIDUAL,
    "three deep": program(
        Loop(
            (2,),
            (Carried("y", "x", "b"),),
            (Loop((2, 1), (Carried("b", "y", "c"),), (Loop((1, 2, 0), (Carried("c", "b", "r"),), layer("c", "r")),)),),
        ),
        **tables(3),
    ),
    "a kernel of each turn": program(
        Loop((3,), (Carried("y", "x", "r"),), layer("y", "r", Row("ks"))),
        scale=drawn(3, C),
        shift=drawn(3, C, seed=1),
        ks=drawn(3, C, C, 3, 3),
    ),
    "combinations": program(
        Loop((3,), (Carried("y", "x", "r"),), (Convolve("r", "y", CombinedKernel("bank", Row("co")), padding=SAME),)),
        bank=drawn(4, C, C, 3, 3),
        co=drawn(3, 4),
    ),
    "tiles": program(
        Loop((3,), (Carried("y", "x", "r"),), (Convolve("r", "y", RepeatedKernel("base", Row("g"), Row("s")), padding=SAME),)),
        base=drawn(C // 2, C // 2, 3, 3),
        g=1 + drawn(3, 2, 2),
        s=drawn(3, 2, 2, seed=1),
    ),
    "a scale for all turns": program(
        Loop((2,), (Carried("y", "x", "t"),), (ScaleShift("r", "y", "a", Row("b")), ScaleShift("t", "r", Row("b"), None))),
        a=drawn(C),
        b=drawn(2, C),
    ),
    "two that change places": program(
        GlobalAverage("m", "x"),
        # the one is an image, the other its mean, until they have changed places
        Loop((3,), (Carried("y", "x", "o"), Carried("o", "m", "product")), (Multiply("product", "y", "o"),)),
    ),
    "what goes on unchanged, and what two carry": program(
        Loop(
            (2,),
            (Carried("y", "x", "r"), Carried("same", "x", "same"), Carried("too", "x", "r"), Carried("outer", "x", "x")),
            (Add("t", "y", "same"), Add("w", "t", "too"), Add("v", "w", "outer"), *layer("v", "r")),
        ),
        **tables(2),
    ),
    "a loop in a branch": program(
        Loop(
            (4,),
            (Carried("y", "x", "b"),),
            (
                Branch(
                    "b",
                    (True, False, True, False),
                    "z",
                    "y",
                    (Loop((2, 1), (Carried("z", "y", "r"),), layer("z", "r")),),
                ),
            ),
        ),
        **tables(3),
    ),
    "a branch in a branch": program(
        Loop(
            (4,),
            (Carried("y", "x", "b"),),
            (
                Branch(
                    "b",
                    (True, False, True, True),
                    "d",
                    "y",
                    (*layer("y", "r"), Branch("d", (True, False, True), "e", "r", (ScaleShift("e", "r", Row("late"), None),))),
                ),
            ),
        ),
        **tables(3),
        late=drawn(2, C, seed=2),
    ),
    "shared and computed kernels outside of loops": program(
        *(
            step
            for x, out in (("x", "q"), ("q", "r"))
            for step in (
                Convolve(f"{out}.c", x, StoredKernel("k"), padding=SAME),
                ScaleShift(f"{out}.s", f"{out}.c", f"{out}.scale", f"{out}.shift"),
                Activate(out, f"{out}.s"),
            )
        ),
        Convolve("t", "r", CombinedKernel("bank", "co"), padding=SAME),
        Convolve("u", "t", CombinedKernel("bank", "other.co"), padding=SAME),
        Convolve("y", "u", RepeatedKernel("base", "g", "s"), padding=SAME),
        channels=6 * C,
        k=drawn(C, C, 3, 3),
        bank=drawn(2, C, C, 3, 3),
        co=drawn(2),
        other_co=drawn(2, seed=1),
        base=drawn(C, C, 3, 3, seed=1),
        g=drawn(6, 1),
        s=drawn(6, 1, seed=1),
        **{f"{out}_{name}": drawn(C, seed=ord(out)) for out in "qr" for name in ("scale", "shift")},
    ),
    "one kernel in two bodies": program(
        Loop((2,), (Carried("u", "x", "r"),), layer("u", "r")),
        Loop((2,), (Carried("y", "u", "s"),), layer("y", "s")),
        **tables(2),
    ),
    "two kernels in one body, one of them twice": program(
        Loop(
            (2,),
            (Carried("y", "x", "t"),),
            (*layer("y", "q"), *layer("q", "r"), Convolve("t", "r", StoredKernel("other"))),
        ),
        **tables(2),
        other=drawn(C, C, 1, 1),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_loops_give_what_the_interpreter_gives(name: str) -> None:
    check(PROGRAMS[name])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_tensor_is_stored_once_in_all_graphs_together(name: str, form: str) -> None:
    of = PROGRAMS[name]
    model = to_onnx_loop(of, form=form)
    stored = stored_arrays(model)
    found = dict(stored)
    assert len(found) == len(stored)
    for tensor, values in of.tensors.items():
        assert found.pop(tensor).tobytes() == values.tobytes()
    assert all(values.nbytes <= 64 for values in found.values())
    assert model.ByteSize() <= 1.05 * of.stored_bytes + 32 * 1024


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_node_reads_the_kernel_of_each_step(name: str, form: str) -> None:
    of = PROGRAMS[name]
    nodes = [node for graph in graphs(to_onnx_loop(of, form=form).graph) for node in graph.node if node.op_type == "Conv"]
    steps = [step for step in of.operations() if isinstance(step, Convolve)]
    # a combination of templates is a convolution of the bank
    assert len(nodes) == len(steps) + sum(isinstance(step.kernel, CombinedKernel) for step in steps)


def homes(of: Program, form: str) -> dict[str, str]:
    """Name of the graph that each tensor stands in."""
    return {tensor.name: graph.name for graph in graphs(to_onnx_loop(of, form=form).graph) for tensor in graph.initializer}


def test_the_fast_form_keeps_a_kernel_in_the_one_body_that_reads_it() -> None:
    for name in ("nested", "residual", "two kernels in one body, one of them twice"):
        assert homes(PROGRAMS[name], "small")["k"] == "dacnn"
        assert homes(PROGRAMS[name], "fast")["k"] == "turns"
    assert homes(PROGRAMS["one kernel in two bodies"], "fast")["k"] == "dacnn"
    # of these, every turn makes a kernel anew
    assert homes(PROGRAMS["combinations"], "fast")["bank"] == homes(PROGRAMS["tiles"], "fast")["base"] == "dacnn"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_optimiser_of_a_runtime_makes_no_copies_of_a_kernel(name: str, form: str) -> None:
    of = PROGRAMS[name]
    # blocks of channels are filled up, the 3 of the stem to 16 at most
    assert optimised_bytes(to_onnx_loop(of, form=form)) <= of.stored_bytes + 6 * of.tensors["stem"].nbytes


@pytest.mark.parametrize("form", FORMS)
def test_the_same_program_gives_the_same_bytes(form: str) -> None:
    one, other = (to_onnx_loop(RESIDUAL, form=form).SerializeToString() for _ in range(2))
    assert one == other


def test_a_kernel_is_one_however_many_turns_there_are() -> None:
    def size(turns: int) -> int:
        return to_onnx_loop(program(Loop((turns,), (Carried("y", "x", "r"),), layer("y", "r")), **tables(turns))).ByteSize()

    assert size(100) - size(10) <= 90 * 2 * 4 * C + 1024
