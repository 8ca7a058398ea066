"""From a Program to the table that the C code runs: values in the order of pixels, kernels in that of the file."""

import math
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from dacnn.deploy.c import arrays
from dacnn.deploy.c.calls import Call, Calls, Geometry
from dacnn.deploy.c.literals import counted
from dacnn.deploy.c.winograd import winograd_pays
from dacnn.deploy.fusion import Stored, tasks, values_of
from dacnn.deploy.program import (
    IMAGES,
    Activate,
    Add,
    AveragePool,
    CombinedKernel,
    Flatten,
    GlobalAverage,
    KernelStep,
    Linear,
    MaxPool,
    Multiply,
    Normalize,
    Operation,
    Program,
    Reference,
    RepeatedKernel,
    Rotate,
    ScaleShift,
    StoredKernel,
    operands,
)
from dacnn.deploy.shapes import Shape, flat_steps, kernel_shape, shapes

# C channels, H rows, W columns, R x S tiles

Array = NDArray[np.float32]


def translate(program: Program, winograd: bool = True) -> Calls:
    """Bring a Program into the form of the C code.

    Args:
        program: A flat one.
        winograd: Whether layers may be computed by Winograd's convolution.

    Returns:
        Its table.

    Raises:
        DeployError: The program has loops, or a value is too large to count.
    """
    return _Translation(program, winograd).run()


class _Translation:
    def __init__(self, program: Program, winograd: bool) -> None:
        self.program = program
        self.winograd = winograd
        self.shapes = shapes(program)
        self.done = Calls(program)
        # the value whose memory each value is
        self.lies: dict[str, str] = {IMAGES: IMAGES}
        # flattened values that lie in the order of pixels, and the images that they were: C, H, W
        self.images: dict[str, tuple[int, ...]] = {}
        self.names: dict[tuple[object, ...], str] = {}
        self.readers: defaultdict[str, list[Operation]] = defaultdict(list)
        for step in flat_steps(program):
            for name in operands(step):
                self.readers[name].append(step)

    def run(self) -> Calls:
        for task in tasks(self.program, sums=True, pools=True):
            if isinstance(task.step, Stored):
                self.stored(task.step)
            else:
                self.operation(task.step)
        self.done.result = self.lies[self.program.result]
        return self.done

    def row(self, op: str, geometry: Geometry, out: str, taken: tuple[str, ...], **rest: str | bool | None) -> None:
        x, z = (*(self.lies[name] for name in taken), None)[:2]
        self.lies[out] = out
        self.done.sizes[out] = counted(math.prod(self.shapes[out]), f"value '{out}'")
        self.done.rows.append(Call(op, geometry, x, out, z, **rest))  # type: ignore[arg-type]

    def put(self, *key: object, values: NDArray[np.floating]) -> str:
        """Name of the array that holds these values; what has one key is stored once."""
        if key not in self.names:
            self.names[key] = f"array_{len(self.names)}"
            self.done.arrays[self.names[key]] = np.ascontiguousarray(values, np.float32)
        return self.names[key]

    def hold(self, *key: object, values: NDArray[np.floating]) -> str:
        """Likewise of a kernel."""
        name = self.put("kernel", *key, values=values)
        self.done.held.add(name)
        return name

    def tensor(self, reference: Reference | None) -> str | None:
        """Name of the array of a tensor as it is."""
        return None if reference is None else self.put(str(reference), values=self.program.tensors[str(reference)])

    # ------------------------------------------------------------ steps with kernels

    def stored(self, stored: Stored) -> None:
        step = stored.step
        assert isinstance(step, KernelStep), "only steps with a kernel take others along"
        geometry = self.convolution(step)
        kernel = self.kernel(step, geometry)
        scale, shift = (stored.affine.scale, stored.affine.shift) if stored.affine else (None, None)
        self.row(
            "convolve",
            geometry,
            stored.out,
            values_of(stored),
            kernel=kernel,
            scale=self.tensor(scale),
            shift=self.tensor(shift),
            relu=stored.relu,
            pool=stored.pool,
            winograd=self.by_winograd(step, geometry, kernel),
        )

    def by_winograd(self, step: KernelStep, of: Geometry, kernel: str | None) -> bool:
        """Whether the fast code takes Winograd's convolution for this step; notes its kernel if so."""
        apart = (of.stride_h, of.stride_w, of.dilation_h, of.dilation_w)
        fits = (of.kernel_h, of.kernel_w, *apart, of.groups) == (3, 3, 1, 1, 1, 1, 1)
        pays = winograd_pays(of.in_c, of.out_c, of.out_h, of.out_w, computed=kernel is None)
        if not (self.winograd and fits and pays):
            return False
        if kernel is not None:
            self.done.kernels[kernel] = self.program.tensors[str(step.kernel.tensor)]
        return True

    def convolution(self, step: KernelStep) -> Geometry:
        x, y = _pixels(self.shapes[step.x]), _pixels(self.shapes[step.out])
        if isinstance(step, Linear):
            return Geometry(*x, *y)
        kernel_h, kernel_w = kernel_shape(step.kernel, self.program.tensors)[2:]
        return Geometry(*x, *y, kernel_h, kernel_w, *step.stride, *step.padding[:2], *step.dilation, step.groups)

    def kernel(self, step: KernelStep, geometry: Geometry) -> str | None:
        """Name of the array of a stored kernel; one that is an expression is evaluated into scratch by a row of its own."""
        kernel, groups = step.kernel, geometry.groups
        stored = self.program.tensors[str(kernel.tensor)]
        image = self.images.get(step.x)
        if isinstance(step, Linear):
            stored = arrays.as_convolution(stored, image)
        if isinstance(kernel, StoredKernel):
            return self.hold(str(kernel.tensor), image, groups, values=arrays.blocked(stored, groups))
        size = geometry.kernel_h * geometry.kernel_w * geometry.out_c * geometry.in_c // groups
        self.done.scratch_kernel = max(self.done.scratch_kernel, size)
        if isinstance(kernel, CombinedKernel):
            bank = self.hold(str(kernel.tensor), image, groups, "bank", values=arrays.blocked_bank(stored, groups))
            sizes = Geometry(in_c=len(stored), out_c=size)
            self.done.rows.append(Call("combine", sizes, kernel=bank, scale=self.tensor(kernel.coefficients)))
        else:
            self.done.rows.append(self.repetition(kernel, stored, geometry))
        return None

    def repetition(self, kernel: RepeatedKernel, base: Array, geometry: Geometry) -> Call:
        rows, columns = self.program.tensors[str(kernel.gain)].shape
        outputs, inputs, kernel_h, kernel_w = base.shape
        sizes = Geometry(rows, columns, inputs, 1, 1, outputs, kernel_h, kernel_w, groups=geometry.groups)
        gain, steepness = self.tensor(kernel.gain), self.tensor(kernel.steepness)
        # tiles of whole blocks are read in runs; others number by number, in the order of (O, I, H, W)
        whole = geometry.groups == 1 and outputs % arrays.BLOCK == 0
        order = (None, 1) if whole else ()
        stored = self.hold(str(kernel.tensor), *order, values=arrays.blocked(base, 1) if whole else base)
        return Call("repeat", sizes, kernel=stored, scale=gain, shift=steepness)

    # ------------------------------------------------------------ all other steps

    def operation(self, step: Operation) -> None:
        match step:
            case Normalize():
                self.normalize(step)
            case ScaleShift():
                scale, shift = self.tensor(step.scale), self.tensor(step.shift)
                self.row("scale_shift", self.same(step), step.out, (step.x,), scale=scale, shift=shift)
            case Activate():
                bounds = self.bounds(step) if step.kind == "clip" else None
                self.row(step.kind, self.same(step), step.out, (step.x,), scale=bounds)
            case MaxPool():
                self.row("max_pool", self.window(step, step.padding), step.out, (step.x,))
            case AveragePool():
                self.row("average_pool", self.window(step), step.out, (step.x,))
            case GlobalAverage():
                x, y = _pixels(self.shapes[step.x]), _pixels(self.shapes[step.out])
                self.row("average_pool", Geometry(*x, *y, *x[:2]), step.out, (step.x,))
            case Flatten():
                self.flatten(step)
            case Rotate():
                self.row("rotate", self.same(step, step.by % self.shapes[step.x][1]), step.out, (step.x,))
            case Add():
                self.row("add", self.same(step), step.out, (step.x, step.y))
            case Multiply():
                op = "multiply" if self.shapes[step.y] == self.shapes[step.x] else "multiply_channels"
                self.row(op, self.same(step), step.out, (step.x, step.y))
            case _:
                raise AssertionError(f"no such step: {step}")

    def normalize(self, step: Normalize) -> None:
        mean, std = (np.array(numbers) for numbers in (self.program.input.mean, self.program.input.std))
        scale = self.put("input", "scale", values=1 / (255 * std))
        shift = self.put("input", "shift", values=-mean / std)
        self.row("normalize", self.same(step), step.out, (step.x,), scale=scale, shift=shift)

    def bounds(self, step: Activate) -> str:
        limit = np.finfo(np.float32).max
        return self.put("clip", step.low, step.high, values=np.clip([step.low, step.high], -limit, limit))

    def flatten(self, step: Flatten) -> None:
        """Free, where the features keep the order of pixels and the linear layers behind it have columns in that order."""
        image = self.shapes[step.x][1:]
        readers = self.readers[step.out]
        turned = all(isinstance(reader, Linear) and not isinstance(reader.kernel, RepeatedKernel) for reader in readers)
        if math.prod(image[1:]) > 1 and (step.out == self.program.result or not turned):
            self.row("flatten", self.same(step), step.out, (step.x,))
            return
        self.lies[step.out] = self.lies[step.x]
        if math.prod(image[1:]) > 1:
            self.images[step.out] = image

    def same(self, step: Operation, kernel_h: int = 1) -> Geometry:
        """Of what gives as many values as it takes."""
        x = self.shapes[step.x]
        pixels = (x[1], x[2], x[3]) if isinstance(step, Normalize) else _pixels(x)
        return Geometry(*pixels, *pixels, kernel_h)

    def window(self, step: MaxPool | AveragePool, padding: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Geometry:
        x, y = _pixels(self.shapes[step.x]), _pixels(self.shapes[step.out])
        return Geometry(*x, *y, *step.size, *step.stride, *padding[:2])


def _pixels(shape: Shape) -> tuple[int, int, int]:
    """H, W and C of a value; features are an image of one pixel."""
    return (shape[2], shape[3], shape[1]) if len(shape) == 4 else (1, 1, shape[1])
