"""Networks in C on emulated boards."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from c_networks import COUNT, tool
from dacnn.deploy.c.target import Microcontroller, flags

FILES = Path(__file__).parent / "deploy" / "cortex_m"


@dataclass(frozen=True)
class Board:
    """A board that QEMU emulates: its processor, and the linker script that knows its memory."""

    target: Microcontroller
    script: str


BOARDS = {
    "mps2-an386": Board("cortex-m4", "mps2.ld"),
    "mps2-an500": Board("cortex-m7", "mps2.ld"),
    "netduinoplus2": Board("cortex-m4", "netduinoplus2.ld"),
}
# a product and its sum are rounded apart, on either side
SAME_ROUNDING = "-ffp-contract=off"


def on_board(name: str, images: NDArray[np.uint8], folder: Path) -> bytes:
    """The bytes of the logits that the network net.c in a folder gives."""
    board = BOARDS[name]
    rows = ",\n".join("{" + ",".join(map(str, image.ravel())) + "}" for image in images)
    (folder / "images.h").write_text(f"static const uint8_t images[{COUNT}][{images[0].size}] = {{\n{rows}\n}};\n")
    linked = (
        "--specs=rdimon.specs",
        "-nostartfiles",
        "-L",
        str(FILES),
        "-T",
        board.script,
        "-I.",
        "-Wall",
        "-Wextra",
        "-Werror",
    )
    files = ("net.c", str(FILES / "main.c"), str(FILES / "start.c"))
    words = [tool("arm-none-eabi-gcc"), *flags(board.target), SAME_ROUNDING, *linked, *files, "-o", "net.elf"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    emulator = [tool("qemu-system-arm"), "-M", name, "-nographic", "-semihosting-config", "enable=on,target=native"]
    done = subprocess.run([*emulator, "-kernel", "net.elf"], cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    return np.array([int(word, 16) for word in done.stdout.split()], np.uint32).tobytes()
