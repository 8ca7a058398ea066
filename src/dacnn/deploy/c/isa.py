"""Instruction sets that the fast C code is written out for, and how many sums their registers hold."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Isa:
    """An instruction set.

    Attributes:
        label: Ends the names of its functions, and names the path for users.
        target: Of the compiler's `target` attribute; empty where the compiler's own is meant.
        features: What the processor must have, as `__builtin_cpu_supports` names it.
        guard: Of the preprocessor: where this code can be compiled.
        lanes: Floats of a vector.
        pixels: Pixels whose sums are held in registers at once; 4 is always there too, and it is at most 8.
        blocks: Blocks of 16 output channels of these sums.
    """

    label: str
    target: str
    features: tuple[str, ...]
    guard: str
    lanes: int
    pixels: int
    blocks: int

    @property
    def tiles(self) -> tuple[int, ...]:
        """Numbers of pixels for which there is code."""
        return tuple(sorted({4, self.pixels}))

    @property
    def per_block(self) -> int:
        """Vectors of a block of 16 output channels."""
        return 16 // self.lanes


# 32 registers hold 8 x 2 sums: twelve pixels measure the same, but their twelve addresses do not fit the other registers
AVX512 = Isa("avx512", "avx512f", ("avx512f",), "defined(__x86_64__)", lanes=16, pixels=8, blocks=2)
# 16 registers: 6 x 2 sums, two rows of the kernel, one input
AVX2 = Isa("avx2", "avx2,fma", ("avx2", "fma"), "defined(__x86_64__)", lanes=8, pixels=6, blocks=1)
# NEON, WebAssembly's vectors and their like: 32 registers, 4 x 4 sums
VECTOR = Isa("vector", "", (), "!defined(__x86_64__)", lanes=4, pixels=4, blocks=1)
# the fastest first
ISAS = (AVX512, AVX2, VECTOR)
