"""Every operation of a program, compiled from C under sanitizers, gives what the interpreter gives."""

from typing import get_args

import pytest

from c_networks import SANITIZED, check, side_by_side
from dacnn.deploy.c.source import FloatDtype, Winograd
from dacnn.deploy.program import (
    Activate,
    Add,
    AveragePool,
    CombinedKernel,
    Convolve,
    Flatten,
    GlobalAverage,
    Linear,
    MaxPool,
    Multiply,
    Normalize,
    Program,
    RepeatedKernel,
    Rotate,
    ScaleShift,
    Step,
    StoredKernel,
)
from onnx_programs import INPUT, C, drawn, program

# float32 sums a few thousand products in another order than float64
EXACT = 2e-5
SAME = (1, 1, 1, 1)
PIXELS = C * INPUT.height * INPUT.width


def behind(*steps: object, **tensors: object) -> Program:
    """Steps behind a convolution, r, which they may become part of."""
    first = Convolve("r", "x", StoredKernel("k"), padding=SAME)
    return program(first, *steps, k=drawn(C, C, 3, 3), **tensors)  # type: ignore[arg-type]


CONVOLUTIONS: dict[str, Program] = {
    "plain": program(Convolve("y", "x", StoredKernel("k"), padding=SAME), k=drawn(C, C, 3, 3)),
    "stride": program(Convolve("y", "x", StoredKernel("k"), stride=(2, 1), padding=SAME), k=drawn(C, C, 3, 3)),
    "uneven padding": program(Convolve("y", "x", StoredKernel("k"), padding=(0, 1, 2, 3)), k=drawn(C, C, 3, 3)),
    "uneven kernel": program(Convolve("y", "x", StoredKernel("k")), k=drawn(C, C, 1, 5)),
    "dilation": program(Convolve("y", "x", StoredKernel("k"), padding=(2, 1, 2, 1), dilation=(2, 1)), k=drawn(C, C, 3, 3)),
    "groups": program(Convolve("y", "x", StoredKernel("k"), padding=SAME, groups=2), k=drawn(C, C // 2, 3, 3)),
    "groups of blocks": program(
        Convolve("y", "x", StoredKernel("k"), padding=SAME, groups=2), channels=38, k=drawn(38, C // 2, 3, 3)
    ),
    "depthwise": program(Convolve("y", "x", StoredKernel("k"), padding=SAME, groups=C), k=drawn(C, 1, 3, 3)),
    "depthwise, twice as wide": program(
        Convolve("y", "x", StoredKernel("k"), padding=SAME, groups=C), channels=2 * C, k=drawn(2 * C, 1, 3, 3)
    ),
    "wide depthwise": program(
        Convolve("r", "x", StoredKernel("w")),
        Convolve("y", "r", StoredKernel("k"), stride=(2, 2), padding=SAME, groups=21),
        channels=21,
        w=drawn(21, C, 1, 1),
        k=drawn(21, 1, 3, 3),
    ),
    "two blocks": program(Convolve("y", "x", StoredKernel("k")), channels=32, k=drawn(32, C, 1, 1)),
    "a narrow last block": program(
        Convolve("r", "x", StoredKernel("k"), padding=SAME),
        Convolve("y", "r", StoredKernel("l"), padding=SAME),
        channels=35,
        k=drawn(35, C, 3, 3),
        l=drawn(35, 35, 3, 3),
    ),
    "combine": program(
        *(Convolve(out, x, CombinedKernel("bank", co), padding=SAME) for out, x, co in (("r", "x", "c"), ("y", "r", "d"))),
        bank=drawn(3, C, C, 3, 3),
        c=drawn(3),
        d=drawn(3, seed=1),
    ),
    "combine groups": program(
        Convolve("y", "x", CombinedKernel("bank", "c"), padding=SAME, groups=4), bank=drawn(3, C, 2, 3, 3), c=drawn(3)
    ),
    "repeat": program(
        Convolve("y", "x", RepeatedKernel("base", "g", "s"), padding=SAME),
        channels=36,
        base=drawn(4, 4, 3, 3),
        g=drawn(9, 2),
        s=drawn(9, 2, seed=1),
    ),
    "repeat whole blocks": program(
        Convolve("y", "x", RepeatedKernel("base", "g", "s"), padding=SAME),
        channels=32,
        base=drawn(16, 4, 3, 3),
        g=drawn(2, 2),
        s=30 * drawn(2, 2, seed=1),
    ),
    "repeat depthwise": program(
        Convolve("y", "x", RepeatedKernel("base", "g", "s"), padding=SAME, groups=C),
        base=drawn(4, 1, 3, 3),
        g=drawn(2, 1),
        s=drawn(2, 1, seed=1),
    ),
    "repeat groups": program(
        Convolve("y", "x", RepeatedKernel("base", "g", "s"), padding=SAME, groups=2),
        base=drawn(4, 2, 3, 3),
        g=drawn(2, 2),
        s=drawn(2, 2, seed=1),
    ),
    "repeat what is read as it is": program(
        Convolve("r", "x", StoredKernel("base")),
        Convolve("y", "r", RepeatedKernel("base", "g", "s")),
        base=drawn(C, C, 3, 3),
        g=drawn(1, 1),
        s=drawn(1, 1, seed=1),
    ),
}

STORES: dict[str, Program] = {
    "scale, shift": behind(ScaleShift("y", "r", "a", "b"), a=drawn(C), b=drawn(C, seed=1)),
    "scale": behind(ScaleShift("y", "r", "a", None), a=drawn(C)),
    "shift, relu": behind(ScaleShift("s", "r", None, "b"), Activate("y", "s"), b=drawn(C)),
    "sum": behind(Add("y", "r", "x")),
    "sum in the other order, relu": behind(Add("s", "x", "r"), Activate("y", "s")),
    "all, pooled": behind(
        ScaleShift("s", "r", "a", "b"),
        Add("t", "s", "x"),
        Activate("u", "t"),
        MaxPool("y", "u"),
        a=drawn(C),
        b=drawn(C, seed=1),
    ),
    "pooled": behind(MaxPool("y", "r")),
    "pooled with a row and a column left over": program(
        Convolve("r", "x", StoredKernel("k"), padding=(1, 1, 0, 0)), MaxPool("y", "r"), k=drawn(C, C, 3, 3)[:, :, :2, :2]
    ),
    "pooled otherwise": behind(MaxPool("y", "r", (3, 3), (2, 2), (1, 1, 1, 1))),
    "read twice": behind(Activate("s", "r"), Add("y", "s", "r")),
    "added to itself": behind(Add("y", "r", "r")),
    "what is added comes later": behind(
        Convolve("s", "x", StoredKernel("k"), padding=SAME), Activate("t", "s"), Add("u", "r", "t"), Activate("y", "u")
    ),
    "what is added is what is convolved": program(
        Activate("r", "x"), Convolve("s", "r", StoredKernel("k"), padding=SAME), Add("y", "s", "r"), k=drawn(C, C, 3, 3)
    ),
}

OTHERS: dict[str, Program] = {
    "scale and shift": program(Activate("r", "x"), ScaleShift("y", "r", "a", "b"), a=drawn(C), b=drawn(C, seed=1)),
    "neither": program(ScaleShift("y", "x", None, None)),
    "clip": program(Activate("y", "x", "clip", -0.25, 0.5)),
    "clip below": program(Activate("y", "x", "clip", low=-0.25)),
    "clip above": program(Activate("y", "x", "clip", high=0.5)),
    **{
        kind: program(Rotate("r", "x", 1), Activate("y", "r", kind))  # type: ignore[arg-type]
        for kind in ("relu", "sigmoid", "silu", "hardsigmoid", "hardswish", "gelu", "tanh")
    },
    "max-pool": program(Rotate("r", "x", 1), MaxPool("y", "r")),
    "padded max-pool": program(MaxPool("y", "x", (3, 3), (2, 2), (1, 1, 0, 1))),
    "average-pool": program(AveragePool("y", "x", (3, 2), (2, 1))),
    "rotate": program(Rotate("y", "x", 1)),
    "rotate back": program(Rotate("y", "x", -3)),
    "rotate around": program(Rotate("y", "x", 2 * C + 1)),
    "rotate not": program(Rotate("y", "x", 0)),
    "add": program(Activate("r", "x"), Add("y", "r", "x")),
    "multiply": program(Activate("r", "x"), Multiply("y", "r", "x")),
    "multiply by means": program(GlobalAverage("m", "x"), Multiply("y", "x", "m")),
}

FEATURES: dict[str, Program] = {
    "combine and repeat": program(
        GlobalAverage("m", "x"),
        Flatten("f", "m"),
        Linear("u", "f", CombinedKernel("bank", "c")),
        Linear("v", "u", RepeatedKernel("base", "g", "s")),
        ScaleShift("w", "v", "a", "b"),
        Activate("y", "w"),
        averaged=True,
        bank=drawn(3, 6, C),
        c=drawn(3),
        base=drawn(4, 3),
        g=drawn(2, 2),
        s=drawn(2, 2, seed=1),
        a=drawn(C),
        b=drawn(C, seed=1),
    ),
    "of pixels": program(Flatten("y", "x"), channels=PIXELS, averaged=True),
    "of pixels, by a bank": program(
        Flatten("f", "x"),
        Linear("y", "f", CombinedKernel("bank", "c")),
        averaged=True,
        bank=drawn(3, C, PIXELS),
        c=drawn(3),
    ),
    "of pixels, by a repetition": program(
        Flatten("f", "x"),
        Linear("y", "f", RepeatedKernel("base", "g", "s")),
        averaged=True,
        base=drawn(C, PIXELS // 2),
        g=drawn(1, 2),
        s=drawn(1, 2, seed=1),
    ),
    "of pixels, scaled": program(
        Flatten("f", "x"),
        ScaleShift("y", "f", "a", None),
        channels=PIXELS,
        averaged=True,
        a=drawn(PIXELS),
    ),
    "of pixels, rotated": program(Flatten("f", "x"), Rotate("y", "f", 7), channels=PIXELS, averaged=True),
    "of pixels, read twice": program(
        Flatten("f", "x"),
        Linear("u", "f", StoredKernel("k")),
        Flatten("g", "x"),
        Activate("h", "g"),
        Linear("v", "h", StoredKernel("k")),
        Add("y", "u", "v"),
        averaged=True,
        k=drawn(C, PIXELS),
    ),
}


GROUPS = {"convolutions": CONVOLUTIONS, "stores": STORES, "others": OTHERS, "features": FEATURES}


@pytest.mark.parametrize("cc", ["gcc", "clang"])
@pytest.mark.parametrize("kind", GROUPS)
def test_an_operation_gives_what_the_interpreter_gives(kind: str, cc: str) -> None:
    # one compilation for all of them; only what is wrong is searched one by one
    whole = {kind: side_by_side(GROUPS[kind].values())}
    try:
        check(whole, cc, relative=EXACT)
    except AssertionError:
        for name, one in GROUPS[kind].items():
            check({name: one}, cc, relative=EXACT)
        raise


def only(*steps: Step, classes: int, **tensors: object) -> Program:
    """Nothing but these steps, from `planes`, the normalised image, to `logits`."""
    of = (Normalize("planes", "images"), *steps)
    return Program("only", INPUT, tuple(map(str, range(classes))), of, "logits", tensors)  # type: ignore[arg-type]


AVERAGED = (GlobalAverage("mean", "y"), Flatten("logits", "mean"))
# what needs one kind of code must not bring functions that nobody calls: a compiler warns
ALONE: dict[str, Program] = {
    "nothing": only(GlobalAverage("mean", "planes"), Flatten("logits", "mean"), classes=3),
    "the image": only(Flatten("logits", "planes"), classes=3 * INPUT.height * INPUT.width),
    "linear": only(Flatten("y", "planes"), Linear("logits", "y", StoredKernel("k")), classes=5, k=drawn(5, 360)),
    "winograd": only(Convolve("y", "planes", StoredKernel("k"), padding=SAME), *AVERAGED, classes=33, k=drawn(33, 3, 3, 3)),
    "winograd, wide": only(
        Convolve("x", "planes", StoredKernel("stem"), padding=SAME),
        Convolve("y", "x", StoredKernel("k"), padding=SAME),
        *AVERAGED,
        classes=16,
        stem=drawn(16, 3, 3, 3),
        k=drawn(16, 16, 3, 3),
    ),
    "depthwise": only(Convolve("y", "planes", StoredKernel("k"), groups=3), *AVERAGED, classes=3, k=drawn(3, 1, 3, 3)),
    "groups": only(Convolve("y", "planes", StoredKernel("k"), groups=3), *AVERAGED, classes=6, k=drawn(6, 1, 3, 3)),
    "combination": only(
        Convolve("y", "planes", CombinedKernel("k", "c"), padding=SAME),
        *AVERAGED,
        classes=16,
        k=drawn(2, 16, 3, 3, 3),
        c=drawn(2),
    ),
}


@pytest.mark.parametrize("dtype", get_args(FloatDtype))
@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_a_network_has_only_the_code_that_it_needs(cc: str, dtype: FloatDtype) -> None:
    check(ALONE, cc, relative=EXACT, dtype=dtype)


@pytest.mark.parametrize("cc", ["gcc", "clang"])
@pytest.mark.parametrize("winograd", ["init", "file"])
def test_plain_code_can_be_had_alone(cc: str, winograd: Winograd) -> None:
    programs = {"a": side_by_side(GROUPS["convolutions"].values()), "b": ALONE["winograd, wide"], "c": ALONE["combination"]}
    portable = [f"-Dnet{index}_PORTABLE" for index in range(len(programs))]
    check(programs, cc, (*SANITIZED, *portable), winograd, relative=EXACT, paths=("portable",))
