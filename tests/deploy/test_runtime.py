"""The compiled library as a callable: logits, threads, and what it refuses."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import dacnn
from c_networks import network_of, tool
from dacnn.deploy.lower import lower
from dacnn.deploy.program import Program
from dacnn.errors import ArtefactError, ShapeError
from dacnn.runtime import Compiled
from interpreter import run
from reference import one_thread  # noqa: F401  (a fixture)

CLASSES = ("cat", "dog", "naïve")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Program]:
    tool("gcc")
    network = network_of("dacnn7", CLASSES, width=8)
    path = tmp_path_factory.mktemp("built") / "net.c"
    dacnn.export(network, "c", path, build=True)
    return path.with_suffix(".so"), lower(network)


@pytest.fixture
def net(made: tuple[Path, Program]) -> Compiled:
    return dacnn.runtime.load(made[0])


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_a_library_gives_the_logits_of_its_program(net: Compiled, made: tuple[Path, Program]) -> None:
    expected = run(made[1], images(3))
    assert net(images(3)).dtype == np.float32
    assert np.abs(net(images(3)) - expected).max() < 1e-5 * np.abs(expected).max()
    assert (net.name, net.input_shape, net.classes) == ("net", (32, 32, 3), CLASSES)


def test_every_path_that_this_processor_has_gives_them(net: Compiled, made: tuple[Path, Program]) -> None:
    expected = run(made[1], images(3))
    for path in {"portable", net.path}:
        other = dacnn.runtime.load(made[0], path)
        assert other.path == path
        assert np.abs(other(images(3)) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_threads_change_nothing(threads: int, net: Compiled) -> None:
    assert np.array_equal(net(images(7), threads), np.concatenate([net(image) for image in images(7)]))


def test_threads_of_the_caller_may_share_one(net: Compiled) -> None:
    batches = [images(count) for count in range(1, 9)]
    expected = [net(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(net, batches))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_images_may_lie_in_memory_in_any_way(net: Compiled) -> None:
    assert np.array_equal(net(np.asfortranarray(images(3))), net(images(3)))
    assert np.array_equal(net(images(6)[::2]), net(np.ascontiguousarray(images(6)[::2])))


def test_a_library_that_was_replaced_is_loaded_anew(net: Compiled, tmp_path: Path) -> None:
    networks = [network_of("dacnn3", CLASSES, width=4, seed=seed) for seed in range(2)]
    loaded = []
    for network in networks:
        dacnn.export(network, "c", tmp_path / "net.c", build=True)
        loaded.append(dacnn.runtime.load(tmp_path / "net.so"))
    expected = [run(lower(network), images(2)) for network in networks]
    for one, logits in zip(loaded, expected, strict=True):
        assert np.abs(one(images(2)) - logits).max() < 1e-5 * np.abs(logits).max()


def test_no_images_give_no_logits(net: Compiled) -> None:
    assert net(images(0)).shape == (0, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        images(2).astype(np.float32),
        images(2).transpose(0, 3, 1, 2),
        images(2)[:, :31],
        images(2)[..., :1],
        images(1)[0, 0],
        np.zeros((1, 1, 32, 32, 3), np.uint8),
    ],
)
def test_other_images_are_refused(wrong: np.ndarray, net: Compiled) -> None:
    with pytest.raises(ShapeError, match=r"'net' takes uint8 of shape N x 32 x 32 x 3"):
        net(wrong)


def test_no_thread_is_refused(net: Compiled) -> None:
    with pytest.raises(ShapeError, match="threads is 0"):
        net(images(1), threads=0)


def test_what_is_no_library_is_refused_in_one_line(made: tuple[Path, Program], tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    (tmp_path / "empty.c").write_text("int nothing;")
    subprocess.run([tool("gcc"), "-shared", "-o", "other.so", "empty.c"], cwd=tmp_path, check=True)
    for name, said in (("missing.so", "no such file"), ("text.so", "no library of a network"), ("other.so", "no library of")):
        with pytest.raises(ArtefactError, match=said) as caught:
            dacnn.runtime.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ArtefactError, match="path 'fast' is not in it"):
        dacnn.runtime.load(made[0], "fast")


def test_the_library_runs_without_torch(made: tuple[Path, Program]) -> None:
    code = (
        "import sys, numpy, dacnn\n"
        f"dacnn.runtime.load({str(made[0])!r})(numpy.zeros((2, 32, 32, 3), numpy.uint8), threads=2)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
