"""On microcontrollers: what a network takes is what is linked, and it gives there the bits of the host's plain code."""

from pathlib import Path
from typing import get_args

import pytest

import dacnn
from boards import BOARDS, SAME_ROUNDING, on_board
from c_networks import compiled, executed, images_for, network_of, tool
from dacnn.deploy.c.build import write
from dacnn.deploy.c.source import to_c
from dacnn.deploy.c.target import Microcontroller, footprint
from dacnn.deploy.lower import lower
from dacnn.errors import DeployError
from reference import one_thread  # noqa: F401  (a fixture)

CLASSES = ("a", "b", "c")


@pytest.mark.parametrize("board", BOARDS)
def test_an_emulated_board_gives_the_bits_of_the_host(board: str, tmp_path: Path) -> None:
    program = lower(network_of("dacnn18", CLASSES, width=4, regulator="pointwise"))
    images = images_for(program)
    write(to_c(program, name="net"), tmp_path)
    found = on_board(board, images, tmp_path)
    (tmp_path / "host").mkdir()
    host = compiled([program], tmp_path / "host", flags=("-O1", SAME_ROUNDING))
    (logits,) = executed([program], [images], [str(host)])
    assert found == logits["portable"].tobytes()


def test_kernels_in_bfloat16_take_half_the_flash_and_give_the_bits_of_the_host(tmp_path: Path) -> None:
    program = lower(network_of("dacnn7", CLASSES, width=16))
    files, floats = to_c(program, name="net", dtype="bfloat16"), to_c(program, name="net")
    saved = footprint(floats, "cortex-m4").flash_bytes - footprint(files, "cortex-m4").flash_bytes
    kernels = sum(tensor.nbytes for tensor in program.tensors.values() if tensor.ndim > 1)
    # what stands behind each array, for vectors, is halved too, and a few instructions are others
    assert abs(saved - kernels / 2) < 256
    write(files, tmp_path)
    images = images_for(program)
    found = on_board("mps2-an386", images, tmp_path)
    (tmp_path / "host").mkdir()
    host = compiled([program], tmp_path / "host", flags=("-O1", SAME_ROUNDING), dtype="bfloat16")
    (logits,) = executed([program], [images], [str(host)])
    assert found == logits["portable"].tobytes()


@pytest.mark.parametrize("target", get_args(Microcontroller))
def test_flash_is_kernels_and_little_code_and_ram_is_what_the_header_says(target: Microcontroller) -> None:
    tool("arm-none-eabi-gcc")
    program = lower(network_of("dacnn14", CLASSES, width=16))
    files = to_c(program, name="net")
    size = footprint(files, target)
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
