"""On microcontrollers: what a network takes is what is linked, and it gives there the bits of the host's plain code."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

import dacnn
from c_networks import COUNT, compiled, executed, images_for, network_of, tool
from dacnn.deploy.c.build import write
from dacnn.deploy.c.source import to_c
from dacnn.deploy.c.target import flags, footprint
from dacnn.deploy.lower import lower
from dacnn.errors import DeployError
from reference import one_thread  # noqa: F401  (a fixture)

BOARD = Path(__file__).parent / "cortex_m"
MACHINES = {"cortex-m4": "mps2-an386", "cortex-m7": "mps2-an500"}
CLASSES = ("a", "b", "c")
# a product and its sum are rounded apart, on either side
SAME_ROUNDING = "-ffp-contract=off"


@pytest.mark.parametrize("target", MACHINES)
def test_an_emulated_board_gives_the_bits_of_the_host(target: str, tmp_path: Path) -> None:
    program = lower(network_of("dacnn18", CLASSES, width=4, regulator="pointwise"))
    images = images_for(program)
    write(to_c(program, name="net"), tmp_path)
    rows = ",\n".join("{" + ",".join(map(str, image.ravel())) + "}" for image in images)
    (tmp_path / "images.h").write_text(f"static const uint8_t images[{COUNT}][{images[0].size}] = {{\n{rows}\n}};\n")
    linked = ("--specs=rdimon.specs", "-nostartfiles", "-T", str(BOARD / "mps2.ld"), "-I.", "-Wall", "-Wextra", "-Werror")
    files = ("net.c", str(BOARD / "main.c"), str(BOARD / "start.c"))
    words = [tool("arm-none-eabi-gcc"), *flags(target), SAME_ROUNDING, *linked, *files, "-o", "net.elf"]  # type: ignore[arg-type]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    emulator = [tool("qemu-system-arm"), "-M", MACHINES[target], "-nographic", "-semihosting-config", "enable=on,target=native"]
    done = subprocess.run(
        [*emulator, "-kernel", "net.elf"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    found = np.array([int(word, 16) for word in done.stdout.split()], np.uint32)
    (tmp_path / "host").mkdir()
    host = compiled([program], tmp_path / "host", flags=("-O1", SAME_ROUNDING))
    (logits,) = executed([program], [images], host)
    assert found.tobytes() == logits["portable"].tobytes()


@pytest.mark.parametrize("target", MACHINES)
def test_flash_is_kernels_and_little_code_and_ram_is_what_the_header_says(target: str) -> None:
    tool("arm-none-eabi-gcc")
    program = lower(network_of("dacnn14", CLASSES, width=16))
    files = to_c(program, name="net")
    size = footprint(files, target)  # type: ignore[arg-type]
    assert program.stored_bytes < size.flash_bytes < 1.1 * program.stored_bytes + 24 * 1024
    # context, image and logits; a few bytes are the linker's, to align
    stated = files.portable_workspace_bytes + 4 + 32 * 32 * 3 + 4 * len(CLASSES)
    assert stated <= size.ram_bytes <= stated + 16


def test_what_does_not_fit_is_not_written(tmp_path: Path) -> None:
    tool("arm-none-eabi-gcc")
    network = network_of("dacnn7", CLASSES, width=8)
    done = dacnn.export(network, "c", tmp_path / "net.c", target="cortex-m4", flash_budget=64_000, ram_budget=64_000)
    assert done.footprint is not None and done.to_table()["footprint"]["ram_bytes"] == done.footprint.ram_bytes
    for path in tmp_path.iterdir():
        path.unlink()
    for name, kind, size in (("flash", "flash", done.footprint.flash_bytes), ("ram", "RAM", done.footprint.ram_bytes)):
        with pytest.raises(
            DeployError, match=rf"net\.c: on cortex-m4 it takes {size:,} bytes of {kind}, {size - 1:,} are given"
        ) as caught:
            dacnn.export(network, "c", tmp_path / "net.c", target="cortex-m4", **{f"{name}_budget": size - 1})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_cross_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    files = to_c(lower(network_of("dacnn3", CLASSES, width=4)), name="net")
    with pytest.raises(DeployError, match="'arm-none-eabi-gcc' is missing: on Debian: apt-get install gcc-arm-none-eabi"):
        footprint(files, "cortex-m4")
