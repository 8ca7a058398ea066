"""From an integer program to the tables that its C code runs: values pixel by pixel, kernels in the order of the code."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dacnn.deploy.c import integer_arrays
from dacnn.deploy.c.calls import Geometry
from dacnn.deploy.c.integer_tables import Cell
from dacnn.deploy.c.literals import counted
from dacnn.deploy.c.memory import Use
from dacnn.deploy.integers.program import CombinedIntegers, IntegerProgram, IntegerStep, Lookup, RepeatedIntegers, Store, Sum
from dacnn.deploy.program import (
    IMAGES,
    AveragePool,
    Convolve,
    Flatten,
    GlobalAverage,
    Linear,
    MaxPool,
    Multiply,
    Rotate,
    ScaleShift,
    operands,
)

# C channels, H rows, W columns, O output channels, T templates

Array = NDArray[Any]
_NONE = "NULL"
# stands for what is written into the caller's memory
LOGITS = ""


@dataclass(frozen=True)
class IntegerCall:
    """A row of the table of steps.

    Attributes:
        op: What is done.
        geometry: On what sizes.
        x: Name of the value that is read; None: none.
        y: Name of the value that is written; None: none.
        z: A value that it is multiplied by.
        residual: A value that is added.
        item: Which row of another table belongs to it, or how far it rotates.
        over: Those of its values that it may write over.
    """

    op: str
    geometry: Geometry
    x: str | None = None
    y: str | None = None
    z: str | None = None
    residual: str | None = None
    item: int = 0
    over: tuple[str, ...] = ()

    def use(self) -> Use | None:
        """What it does with values; None: nothing."""
        if self.y is None:
            return None
        return Use(tuple(name for name in (self.x, self.z, self.residual) if name is not None), self.y, self.over)


@dataclass(frozen=True)
class TransformedKernel:
    """A kernel that AVX2 reads in the domain of Winograd's convolution.

    Attributes:
        array: Name of the array that holds it as it is.
        outputs: Output channels.
        inputs: Input channels.
        offset: Where it begins among all of them, in numbers.
    """

    array: str
    outputs: int
    inputs: int
    offset: int

    @property
    def size(self) -> int:
        """Its numbers."""
        return 36 * self.outputs * self.inputs


@dataclass
class IntegerCalls:
    """The tables and what they name.

    Attributes:
        rows: The steps.
        arrays: Type in C and numbers, by name.
        sums: A row for every step that sums up, its pointers and numbers by column.
        residuals: The value that each of them adds.
        combinations: A row for every kernel that is combined.
        repetitions: A row for every kernel that is repeated.
        tables: Those of steps that look numbers up.
        factors: Of the stores, one behind the other.
        addends: Likewise.
        sizes: Bytes of every value.
        transformed: Kernels in the domain of Winograd's convolution, by the name of their array.
        made_bytes: Of the largest kernel that is computed while running.
        made_own: Numbers of the weights of channels for themselves that are.
        result: Name of the value that holds the logits.
        wide: Whether that is int32.
    """

    rows: list[IntegerCall] = field(default_factory=list)
    arrays: dict[str, tuple[str, Array]] = field(default_factory=dict)
    sums: list[dict[str, Cell]] = field(default_factory=list)
    residuals: list[str | None] = field(default_factory=list)
    combinations: list[dict[str, Cell]] = field(default_factory=list)
    repetitions: list[dict[str, Cell]] = field(default_factory=list)
    tables: list[Array] = field(default_factory=list)
    factors: list[Array] = field(default_factory=list)
    addends: list[Array] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    transformed: dict[str, TransformedKernel] = field(default_factory=dict)
    made_bytes: int = 0
    made_own: int = 0
    result: str = ""
    wide: bool = False


def translate_integers(program: IntegerProgram) -> IntegerCalls:
    """Bring an integer program into the form of its C code.

    Raises:
        DeployError: A value is too large to count.
    """
    return _Translation(program).run()


def values_of(step: IntegerStep) -> tuple[str, ...]:
    """Names of the values that a step takes, one twice where it is taken twice."""
    if not isinstance(step, Sum):
        return (step.x,)
    return (*operands(step.step), *(() if step.store.residual is None else (step.store.residual,)))


class _Translation:
    def __init__(self, program: IntegerProgram) -> None:
        self.program, self.done = program, IntegerCalls()
        # the value whose memory each value is
        self.lies = {IMAGES: IMAGES}
        # flattened values that stay in the order of pixels, and the images that they were: C, H, W
        self.images: dict[str, tuple[int, int, int]] = {}
        # those that are brought into the order of features
        self.reordered = {step.out for step in program.steps if isinstance(step, Flatten) and not self.may_stay(step)}
        self.wide: set[str] = set()
        self.names: dict[tuple[object, ...], str] = {}

    def run(self) -> IntegerCalls:
        for step in self.program.steps:
            self.step(step)
        done, result = self.done, self.lies[self.program.result]
        done.result, done.wide = result, result in self.wide
        done.rows.append(IntegerCall("logits", done.rows[-1].geometry, result, LOGITS))
        return done

    def step(self, step: IntegerStep) -> None:
        match step:
            case Sum():
                self.sum(step)
            case Lookup():
                self.keep_order(step.x, step.out)
                self.row(
                    "lookup", self.geometry(step.x, step.out), step.x, step.out, item=len(self.done.tables), over=(step.x,)
                )
                self.done.tables.append(step.table)
            case MaxPool():
                sizes = self.geometry(step.x, step.out, step.size, step.stride, step.padding[:2])
                self.row("max_pool", sizes, step.x, step.out)
            case Rotate():
                sizes = self.geometry(step.x, step.out)
                self.row("rotate", sizes, step.x, step.out, item=step.by % sizes.in_c)
            case Flatten():
                shape = self.program.shapes[step.x][1:]
                if step.out in self.reordered:
                    self.row("flatten", self.geometry(step.x, step.x), step.x, step.out)
                    return
                self.lies[step.out] = self.lies[step.x]
                if len(shape) == 3:
                    self.images[step.out] = (shape[0], shape[1], shape[2])
                else:
                    self.keep_order(step.x, step.out)

    def may_stay(self, flatten: Flatten) -> bool:
        """Whether a flattened image may stay in the order of pixels: kernels alone read it, and can be put in that order."""
        shape = self.program.shapes[flatten.x][1:]
        if len(shape) < 3 or shape[0] == 1 or shape[1:] == (1, 1):
            return True
        # what is the same value, number by number
        names = {flatten.out}
        for step in self.program.steps:
            taken = values_of(step)
            if not names & set(taken):
                continue
            alone = len(taken) == 1
            if isinstance(step, Lookup | Flatten) or (alone and isinstance(step, Sum) and isinstance(step.step, ScaleShift)):
                names.add(step.out)
                continue
            kernel = step.kernel if alone and isinstance(step, Sum) and isinstance(step.step, Linear) else None
            # a kernel that is repeated while running has the order that its base has
            if kernel is None or isinstance(kernel, RepeatedIntegers):
                return False
        return self.program.result not in names

    def keep_order(self, x: str, y: str) -> None:
        if x in self.images:
            self.images[y] = self.images[x]

    def row(self, op: str, sizes: Geometry, x: str, y: str, **rest: Any) -> None:
        for name in ("z", "residual"):
            if rest.get(name) is not None:
                rest[name] = self.lies[rest[name]]
        over = tuple(self.lies[name] for name in rest.pop("over", ()))
        self.lies[y] = y
        wide = 4 if y in self.wide else 1
        self.done.sizes[y] = counted(wide * math.prod(self.program.shapes[y]), f"value '{y}'")
        self.done.rows.append(IntegerCall(op, sizes, self.lies[x], y, over=over, **rest))

    def pixels(self, name: str) -> tuple[int, int, int]:
        shape = self.program.shapes[name]
        if name == IMAGES:
            return shape[1], shape[2], shape[3]
        return (shape[2], shape[3], shape[1]) if len(shape) == 4 else (1, 1, shape[1])

    def geometry(
        self,
        x: str,
        y: str,
        size: tuple[int, ...] = (1, 1),
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] = (0, 0),
        dilation: tuple[int, ...] = (1, 1),
        groups: int = 1,
    ) -> Geometry:
        return Geometry(*(*self.pixels(x), *self.pixels(y), *size, *stride, *padding, *dilation, groups))

    def put(self, *key: object, kind: str, values: Array, slack: int = 0) -> str:
        """Name of the array that holds these values; what has one key is stored once."""
        if key not in self.names:
            self.names[key] = f"array_{len(self.names)}"
            self.done.arrays[self.names[key]] = (kind, np.concatenate([values.ravel(), np.zeros(slack, values.dtype)]))
        return self.names[key]

    # ------------------------------------------------------------ steps that sum up

    def sum(self, step: Sum) -> None:
        inner, store = step.step, step.store
        if store.low < 0 or store.high > 255:
            self.wide.add(step.out)
        row: dict[str, Cell] = {"kernel": _NONE, "own": _NONE, "transformed": -1, "has_made_own": 0, "other_pixels": 0}
        z, over = None, [inner.x] if step.kernel is None else []
        sizes, op = self.geometry(inner.x, step.out), "affine"
        if isinstance(inner, Convolve | Linear):
            sizes, op = self.convolution(step, row), "convolve"
        elif isinstance(inner, AveragePool):
            sizes, op, over = self.geometry(inner.x, step.out, inner.size, inner.stride), "average_pool", []
        elif isinstance(inner, GlobalAverage):
            sizes, op, over = self.geometry(inner.x, step.out, self.pixels(inner.x)[:2]), "average_pool", []
        elif isinstance(inner, Multiply):
            op, z = "multiply", inner.y
            row["other_pixels"] = math.prod(self.pixels(inner.y)[:2])
            if self.pixels(inner.x) == self.pixels(inner.y):
                over.append(inner.y)
        order = np.arange(len(store.m))
        if op == "affine" and inner.x in self.images:
            self.keep_order(inner.x, step.out)
            if len(order) > 1:
                order = order.reshape(self.images[inner.x]).transpose(1, 2, 0).ravel()
        if store.residual is not None and self.lies[store.residual] != self.lies[inner.x]:
            over.append(store.residual)
        self.store(store, order, row)
        row |= {"zero": step.zero, "other_zero": step.other_zero, "wide": int(step.out in self.wide)}
        over = [] if row["wide"] else over
        self.row(op, sizes, inner.x, step.out, z=z, residual=store.residual, item=len(self.done.sums), over=over)
        self.done.residuals.append(None if store.residual is None else self.lies[store.residual])
        self.done.sums.append(row)

    def store(self, store: Store, order: NDArray[np.intp], row: dict[str, Cell]) -> None:
        row |= {
            "first": sum(len(factors) for factors in self.done.factors),
            "per_channel": int(len(store.m) > 1),
            "b_shift": store.b_shift,
            "shift": store.shift,
            "out_zero": store.zero,
            "low": store.low,
            "high": store.high,
            "residual_zero": store.residual_zero,
            "residual_m": store.residual_m,
        }
        self.done.factors.append(store.m[order])
        self.done.addends.append(store.b[order])

    # ------------------------------------------------------------ kernels

    def convolution(self, step: Sum, row: dict[str, Cell]) -> Geometry:
        """Sizes of a step with a kernel, which is put into its row, or into scratch by a row of its own."""
        inner, kernel = step.step, step.kernel
        assert kernel is not None and isinstance(inner, Convolve | Linear)
        stored = self.program.tensors[kernel.tensor]
        image, groups = None, 1
        sizes = self.geometry(inner.x, step.out)
        if isinstance(inner, Convolve):
            groups = inner.groups
            taps = stored.shape[-2:]
            sizes = self.geometry(inner.x, step.out, taps, inner.stride, inner.padding[:2], inner.dilation, groups)
        else:
            image = self.images.get(inner.x)
        if isinstance(kernel, RepeatedIntegers):
            self.repeat(kernel, stored, sizes)
        elif isinstance(kernel, CombinedIntegers):
            self.combine(kernel, stored, sizes, image)
            row["has_made_own"] = int(kernel.own is not None)
        else:
            whole = integer_arrays.as_convolution(stored, image) if isinstance(inner, Linear) else stored
            blocks = integer_arrays.blocked(whole, groups)
            name = self.put(kernel.tensor, image, groups, kind="int8_t", values=blocks, slack=integer_arrays.SLACK)
            row["kernel"] = name
            if kernel.own is not None:
                own = self.program.tensors[kernel.own]
                row["own"] = self.put(kernel.own, kind="int16_t", values=own, slack=integer_arrays.BLOCK)
            narrow = step.out not in self.wide
            if narrow and isinstance(inner, Convolve) and integer_arrays.takes_winograd(inner, stored, sizes, step.zero):
                row["transformed"] = self.transformed(name, sizes)
        return sizes

    def transformed(self, array: str, sizes: Geometry) -> int:
        known = self.done.transformed
        if array not in known:
            offset = sum(one.size for one in known.values())
            known[array] = TransformedKernel(array, sizes.out_c, sizes.in_c, counted(offset, "the transformed kernels"))
        return known[array].offset

    def combine(self, kernel: CombinedIntegers, bank: Array, sizes: Geometry, image: tuple[int, int, int] | None) -> None:
        templates = [integer_arrays.as_convolution(one, image) if one.ndim == 2 else one for one in bank]
        blocks = np.concatenate([integer_arrays.blocked(one, sizes.groups) for one in templates])
        own = _NONE
        if kernel.own is not None:
            own = self.put(kernel.own, kind="int16_t", values=self.program.tensors[kernel.own])
            self.done.made_own = max(self.done.made_own, sizes.out_c)
        count = counted(blocks.size // len(bank), f"kernel '{kernel.tensor}'")
        coefficients = self.put(id(kernel), kind="int16_t", values=kernel.coefficients)
        row: dict[str, Cell] = {
            "bank": self.put(kernel.tensor, image, sizes.groups, "bank", kind="int8_t", values=blocks),
            "coefficients": coefficients,
            "own": own,
            "templates": len(bank),
            "shift": kernel.shift,
            "count": count,
        }
        self.done.made_bytes = max(self.done.made_bytes, count)
        self.done.rows.append(IntegerCall("combine", sizes, item=len(self.done.combinations)))
        self.done.combinations.append(row)

    def repeat(self, kernel: RepeatedIntegers, base: Array, sizes: Geometry) -> None:
        rows, columns = kernel.gain.shape
        inputs = sizes.in_c // sizes.groups
        depthwise = integer_arrays.is_depthwise(sizes.out_c, inputs, sizes.groups)
        count = sizes.kernel_h * sizes.kernel_w * sizes.out_c * (1 if depthwise else (inputs + 3) // 4 * 4)
        row: dict[str, Cell] = {
            "base": self.put(kernel.tensor, "base", kind="int8_t", values=base),
            "gain": self.put(id(kernel), "gain", kind="int32_t", values=kernel.gain),
            "steepness": self.put(id(kernel), "steepness", kind="int32_t", values=kernel.steepness),
            "rows": rows,
            "columns": columns,
            "outputs": base.shape[0],
            "inputs": base.shape[1],
            "bytes": counted(count, f"kernel '{kernel.tensor}'"),
        }
        self.done.made_bytes = max(self.done.made_bytes, count)
        self.done.rows.append(IntegerCall("repeat", sizes, item=len(self.done.repetitions)))
        self.done.repetitions.append(row)
