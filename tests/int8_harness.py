"""An IntegerProgram as C, one call a step: what tests and times the int8 templates by themselves."""

import ctypes
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from dacnn.deploy.c import integer_arrays
from dacnn.deploy.integers.kernels import combined, repeated
from dacnn.deploy.integers.program import (
    SIGMOID,
    CombinedIntegers,
    IntegerProgram,
    Lookup,
    RepeatedIntegers,
    Sum,
)
from dacnn.deploy.program import AveragePool, Convolve, Flatten, GlobalAverage, Linear, MaxPool, Multiply, Rotate

# C channels, H rows, W columns

Array = NDArray[Any]
TILES = (6, 4, 1)
SHELL = """
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#define BLOCK 16
typedef struct {
    int in_h, in_w, in_c, out_h, out_w, out_c, kernel_h, kernel_w;
    int stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups;
} net_geometry;
{% include "int8.c.jinja" %}
{% include "int8_x86.c.jinja" %}
{% include "int8_avx2.c.jinja" %}
{% for array in arrays %}
static const {{ array.type }} {{ array.name }}[{{ array.length }}] = { {{ array.numbers }} };
{% endfor %}
{% for kernel, (outputs, inputs, count) in transforms.items() %}
static int16_t transformed_{{ kernel }}[{{ count }}];
{% endfor %}
void init(void);
void init(void)
{
{% for kernel, (outputs, inputs, count) in transforms.items() %}
    transform_int8_kernel({{ kernel }}, {{ outputs }}, {{ inputs }}, transformed_{{ kernel }});
{% endfor %}
}
void run(const uint8_t *image, int path, uint8_t *workspace, uint8_t *scratch, float *logits);
void run(const uint8_t *image, int path, uint8_t *workspace, uint8_t *scratch, float *logits)
{
    int k;
{% for call in calls %}
    {
        {{ call }}
    }
{% endfor %}
    for (k = 0; k < {{ classes }}; k++)
        logits[k] = {{ logit_scale }} * (float)({{ logit }}[k] - {{ logit_zero }});
}
"""
CONVOLVE = """if (path == 0) convolve_int8_portable(&s, {x}, {y});
        else if (path == 1) convolve_int8_avx2(&s, {x}, scratch, {y});
        else convolve_int8_vnni(&s, {x}, scratch, {y});"""


class Harness:
    """The text of a program."""

    def __init__(self, program: IntegerProgram) -> None:
        self.program = program
        self.arrays: dict[str, dict[str, Any]] = {}
        self.offsets: dict[str, int] = {}
        self.end = 0
        self.scratch = 0
        self.ops: set[str] = set()
        self.transforms: dict[str, tuple[int, int, int]] = {}
        self.features: set[str] = set()
        self.calls = [self.call(step) for step in program.steps]

    def put(self, name: str, kind: str, numbers: Array) -> str:
        name = "a_" + "".join(c if c.isalnum() else "_" for c in name)
        flat = [*numbers.ravel().tolist(), *[0] * integer_arrays.SLACK]
        self.arrays[name] = {"name": name, "type": kind, "length": len(flat), "numbers": ", ".join(map(str, flat))}
        return name

    def place(self, name: str) -> str:
        if name == "images":
            return "image"
        if name not in self.offsets:
            self.offsets[name] = self.end
            self.end += (math.prod(self.program.shapes[name]) * 4 + 127) // 64 * 64
        return f"(workspace + {self.offsets[name]})"

    def pixels(self, name: str) -> tuple[int, int, int]:
        shape = self.program.shapes[name]
        if name == "images":
            return shape[1], shape[2], shape[3]
        return (shape[2], shape[3], shape[1]) if len(shape) == 4 else (1, 1, shape[1])

    def call(self, step: Any) -> str:
        x, y = self.place(step.step.x if isinstance(step, Sum) else step.x), self.place(step.out)
        match step:
            case Sum():
                return self.sum(step, x, y)
            case Lookup():
                self.ops.add("lookup")
                table = self.put(step.out, "uint8_t", step.table)
                return f"apply_lookup({table}, {x}, {math.prod(self.program.shapes[step.x])}, {y});"
            case MaxPool():
                self.ops.add("max_pool")
                g = self.geometry(step.x, step.out, step.size, step.stride, step.padding[:2])
                return f"const net_geometry g = {g}; apply_max_pool(&g, {x}, {y});"
            case Rotate():
                self.ops.add("rotate")
                h, w, c = self.pixels(step.x)
                return f"apply_rotate({x}, {h * w}, {c}, {step.by % c}, {y});"
        assert isinstance(step, Flatten)
        self.offsets[step.out] = self.offsets[step.x]
        return ";"

    def geometry(
        self,
        x: str,
        y: str,
        size: Any = (1, 1),
        stride: Any = (1, 1),
        padding: Any = (0, 0),
        dilation: Any = (1, 1),
        groups: int = 1,
    ) -> str:
        numbers = (*self.pixels(x), *self.pixels(y), *size, *stride, *padding, *dilation, groups)
        return "{" + ", ".join(map(str, numbers)) + "}"

    def sum(self, step: Sum, x: str, y: str) -> str:
        inner, store = step.step, step.store
        wide = int(store.low < 0 or store.high > 255)
        numbers = (store.b_shift, store.shift, store.zero, store.low, store.high, store.residual_zero, store.residual_m)
        m, b = self.put(f"{step.out}_m", "int32_t", store.m), self.put(f"{step.out}_b", "int16_t", store.b)
        stored = f"{{{m}, {b}, {', '.join(map(str, numbers))}, {int(len(store.m) > 1)}, {wide}}}"
        kernel, own, transformed, geometry = "NULL", "NULL", "NULL", self.geometry(inner.x, step.out)
        if step.kernel is not None:
            kernel, own, transformed, geometry = self.kernel(step)
            call = CONVOLVE.format(x=x, y=y)
            self.ops.add("convolve")
        elif isinstance(inner, AveragePool | GlobalAverage):
            self.ops.add("average_pool")
            size = inner.size if isinstance(inner, AveragePool) else self.pixels(inner.x)[:2]
            geometry = self.geometry(inner.x, step.out, size, inner.stride if isinstance(inner, AveragePool) else (1, 1))
            call = f"apply_average_pool(&s, {x}, {y});"
        elif isinstance(inner, Multiply):
            self.ops.add("multiply")
            pixels = math.prod(self.pixels(inner.y)[:2])
            call = f"apply_multiply(&s, {x}, {self.place(inner.y)}, {pixels}, {y});"
        else:
            self.ops.add("affine")
            call = f"apply_affine(&s, {x}, {y});"
        residual = "NULL" if store.residual is None else self.place(store.residual)
        return f"""const net_geometry g = {geometry};
        const net_store store = {stored};
        net_sum s;
        s.size = &g; s.store = &store; s.kernel = {kernel}; s.own = {own}; s.transformed = {transformed};
        s.residual = {residual}; s.zero = {step.zero}; s.other_zero = {step.other_zero};
        {call}"""

    def kernel(self, step: Sum) -> tuple[str, str, str, str]:
        inner, read = step.step, step.kernel
        assert read is not None and isinstance(inner, Convolve | Linear)
        weights, name = self.program.tensors[read.tensor], read.tensor
        own = None if isinstance(read, RepeatedIntegers) or read.own is None else self.program.tensors[read.own]
        if isinstance(read, CombinedIntegers):
            weights, name = combined(weights, read), f"{step.out}_kernel"
            own = None if own is None else combined(own, read, 32767)
        elif isinstance(read, RepeatedIntegers):
            weights, name = repeated(weights, read), f"{step.out}_kernel"
        if isinstance(inner, Linear):
            made = {one.out: one for one in self.program.steps}
            flat = made[inner.x]
            shape = self.program.shapes[flat.x][1:] if isinstance(flat, Flatten) else None
            weights = integer_arrays.as_convolution(weights, shape)
            geometry, groups = self.geometry(inner.x, step.out), 1
            _, _, channels = self.pixels(inner.x)
        else:
            groups = inner.groups
            geometry = self.geometry(
                inner.x, step.out, weights.shape[2:], inner.stride, inner.padding[:2], inner.dilation, groups
            )
            h, w, channels = self.pixels(inner.x)
            self.scratch = max(self.scratch, (h + sum(inner.padding[::2])) * (w + sum(inner.padding[1::2])) * channels)
        depthwise = integer_arrays.is_depthwise(*weights.shape[:2], groups)
        self.features.add("depthwise" if depthwise else "dense")
        kernel = self.put(name, "int8_t", integer_arrays.blocked(weights, groups))
        apart = "NULL" if own is None else self.put(f"{name}_own", "int16_t", own)
        transformed = "NULL"
        if isinstance(inner, Convolve) and integer_arrays.takes_winograd(inner, weights.shape):
            self.transforms[kernel] = (*weights.shape[:2], 16 * weights.shape[0] * weights.shape[1])
            transformed = f"transformed_{kernel}"
            self.scratch = max(self.scratch, 16 * 24 * (2 * channels + 64) + 4096)
        return kernel, apart, transformed, geometry

    def source(self) -> str:
        loader = jinja2.PackageLoader("dacnn.deploy.c")
        shell = jinja2.Environment(
            loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        )
        result = self.program.result
        wide = any(isinstance(step, Sum) and (step.store.low < 0 or step.store.high > 255) for step in self.program.steps)
        return shell.from_string(SHELL + chr(10)).render(
            name="net",
            tiles=TILES,
            winograd=True,
            ops=self.ops | {"convolve"},
            features=self.features | {"dense"},
            sigmoid=SIGMOID.tolist(),
            arrays=list(self.arrays.values()),
            transforms=self.transforms,
            calls=self.calls,
            classes=len(self.program.classes),
            logit_scale=f"{float.hex(self.program.logit.scale)}f",
            logit_zero=self.program.logit.zero,
            logit=f"((const {'int32_t' if wide else 'uint8_t'} *)(const void *){self.place(result)})",
        )


# paths of the code, by the flag of the CPU that each needs
PATHS = {"portable": "", "avx2": "avx2", "vnni": "avx512_vnni"}


def paths() -> list[str]:
    """The paths that this CPU has."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return [path for path, flag in PATHS.items() if not flag or flag in flags]


class Compiled:
    """A function of uint8 images, N x H x W x C, and a path, that gives logits."""

    def __init__(self, program: IntegerProgram, compiler: str = "gcc", flags: tuple[str, ...] = ("-O3",)) -> None:
        harness = Harness(program)
        self.classes = len(program.classes)
        words = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-pedantic", *flags, "-shared", "-fPIC"]
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "net.c", Path(folder) / "net.so"
            source.write_text(harness.source())
            subprocess.run([compiler, *words, "-o", library, source], check=True)
            self.library = ctypes.CDLL(str(library))
        self.library.init()
        # vectors are read over the end of a value, and scratch begins where a vector may
        self.workspace, self.scratch = (np.zeros(size + 512, np.uint8) for size in (harness.end, harness.scratch))

    def __call__(self, images: NDArray[np.uint8], path: str) -> NDArray[np.float32]:
        logits = np.zeros((len(images), self.classes), np.float32)
        for image, row in zip(np.ascontiguousarray(images), logits, strict=True):
            memory = [ctypes.c_void_p(one.ctypes.data) for one in (image, self.workspace, self.scratch, row)]
            self.library.run(memory[0], list(PATHS).index(path), *memory[1:])
        return logits
