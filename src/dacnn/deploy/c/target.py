"""Microcontrollers: what a network takes of their flash and RAM, read off the program that is linked for them."""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dacnn.deploy.c.build import compile_with, found, write
from dacnn.deploy.c.source import CSource, to_footprint
from dacnn.errors import DeployError

Microcontroller = Literal["cortex-m4", "cortex-m7"]
_UNITS: dict[Microcontroller, str] = {"cortex-m4": "fpv4-sp-d16", "cortex-m7": "fpv5-sp-d16"}
_COMPILER = "arm-none-eabi-gcc"
_SIZE = "arm-none-eabi-size"
_REMEDY = "on Debian: apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi"


@dataclass(frozen=True)
class Footprint:
    """Memory of a microcontroller.

    Attributes:
        target: Its processor.
        flash_bytes: Code, kernels and all other constants.
        ram_bytes: Context, workspace, one image and its logits; the stack, about a kilobyte, comes on top.
    """

    target: Microcontroller
    flash_bytes: int
    ram_bytes: int


def flags(target: Microcontroller) -> tuple[str, ...]:
    """How the cross compiler is called for a processor."""
    return (f"-mcpu={target}", "-mthumb", "-mfloat-abi=hard", f"-mfpu={_UNITS[target]}", "-std=c99", "-O2")


def footprint(source: CSource, target: Microcontroller) -> Footprint:
    """Link the least program around a network and read its sizes.

    Args:
        source: The network.
        target: The processor.

    Returns:
        The sizes.

    Raises:
        DeployError: The cross compiler is missing or refuses.
    """
    compiler, size = found(_COMPILER, _REMEDY), found(_SIZE, _REMEDY)
    # without what the C library does before main, and without what nobody calls
    linked = ("--specs=nano.specs", "--specs=nosys.specs", "-nostartfiles", "-Wl,--entry=main", "-Wl,--gc-sections")
    with tempfile.TemporaryDirectory(prefix="dacnn-") as folder:
        path = write(source, Path(folder))
        main = Path(folder) / "footprint.c"
        main.write_text(to_footprint(source.name), encoding="ascii")
        sections = ("-ffunction-sections", "-fdata-sections")
        words = (compiler, *flags(target), *sections, *linked, "-o", "net.elf", path.name, main.name, "-lm")
        compile_with(words, Path(folder))
        done = subprocess.run([size, "net.elf"], cwd=folder, capture_output=True, text=True, check=True)
    text, data, bss = map(int, done.stdout.splitlines()[1].split()[:3])
    return Footprint(target, text + data, data + bss)


# what lowers each; what layers compute takes the same RAM whoever owns their kernels
_REMEDIES = {
    "flash": "for flash, share more, store kernels in fewer bytes (--dtype bfloat16 or int8), or make the network narrower",
    "RAM": "for RAM, compute in integers (--dtype int8), take smaller images, or make the network narrower",
}


def check_budget(of: Footprint, flash_bytes: int | None, ram_bytes: int | None, where: str) -> None:
    """Refuse what does not fit.

    Args:
        of: What the network takes.
        flash_bytes: What there is; None: enough.
        ram_bytes: Likewise.
        where: The file, for the message.

    Raises:
        DeployError: It does not fit.
    """
    over = {
        kind: f"{needed:,} bytes of {kind}, {budget:,} are given"
        for kind, needed, budget in (("flash", of.flash_bytes, flash_bytes), ("RAM", of.ram_bytes, ram_bytes))
        if budget is not None and needed > budget
    }
    if over:
        remedies = "; ".join(_REMEDIES[kind] for kind in over)
        raise DeployError(f"{where}: on {of.target} it takes {' and '.join(over.values())}: {remedies}")
