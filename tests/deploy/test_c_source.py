"""What the generated files say, and that compilers take them whatever the names and numbers are."""

import dataclasses
import re
import subprocess
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from c_networks import STRICT, tool
from dacnn.deploy.c.arrays import blocked
from dacnn.deploy.c.build import write
from dacnn.deploy.c.literals import floats, identifier, string
from dacnn.deploy.c.provenance import signed, weights_hash
from dacnn.deploy.c.source import to_c
from dacnn.deploy.lower import lower
from dacnn.deploy.parity import Parity
from dacnn.deploy.program import Carried, Convolve, Loop, Program, StoredKernel
from dacnn.errors import DeployError
from dacnn.networks.network import create
from onnx_programs import CLASSES, C, drawn, program

K = drawn(C, C, 3, 3)
TINY = program(Convolve("y", "x", StoredKernel("k"), padding=(1, 1, 1, 1)), k=K)


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
def test_numbers_read_back_as_they_were(values: list[float]) -> None:
    expected = np.array(values, np.float32)
    words = floats(expected).replace("\n", " ").split(",")
    # a compiler takes a number without point and exponent for an integer, which has no negative zero
    read = np.array([float(int(word)) if re.fullmatch(r"\s*-?\d+", word) else float(word) for word in words])
    assert read.astype(np.float32).tobytes() == expected.tobytes()


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(DeployError, match="no numbers"):
        to_c(dataclasses.replace(TINY, tensors={**TINY.tensors, "k": K * np.float32("nan")}), name="net")


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.text(max_size=8), min_size=len(CLASSES), max_size=len(CLASSES)), name=st.text(max_size=20))
def test_any_words_may_name_classes_and_networks(words: list[str], name: str, tmp_path: Path) -> None:
    of = Program(name, TINY.input, tuple(words), TINY.steps, TINY.result, TINY.tensors)
    files = signed(to_c(of, name="net"), of, Parity(1, 0.0, 1.0, 0), "float32")
    command = [tool("gcc"), *STRICT, "-fsyntax-only", "-Dnet_PORTABLE", write(files, tmp_path).name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("word", ["a?" + "?/", '"\\', "*/ /* //", "naïve", "\n\0\t", "%s"])
def test_words_hold_nothing_that_a_compiler_takes_for_something_else(word: str) -> None:
    text = string(word)
    assert re.fullmatch(r'"(\\[0-7]{3}|[^"\\?*/\n])*"', text) and text.isascii()
    read = re.sub(r"\\(...)", lambda found: chr(int(found[1], 8)), text[1:-1])
    assert read.encode("latin-1") == word.encode()


@pytest.mark.parametrize(("word", "better"), [("net-1", "net_1"), ("1st", "net_1st"), ("", "net"), ("naïve", "na_ve")])
def test_a_name_that_c_cannot_have_is_refused_with_one_that_it_can(word: str, better: str) -> None:
    with pytest.raises(DeployError, match=rf"'{word}' is no name in C.*call the file {better}\.c"):
        to_c(TINY, name=word)
    assert identifier(better) == better


def test_no_name_that_is_given_is_one_that_the_file_has_already(tmp_path: Path) -> None:
    wide = program(Convolve("y", "x", StoredKernel("k"), padding=(1, 1, 1, 1)), channels=16, k=drawn(16, C, 3, 3))
    names = ["load", "find", "place", "can", "apply", "int"]
    paths = [write(to_c(wide, name=name), tmp_path).name for name in names]
    tiled = lower(create("dacnn3", width=16, share="repeat"))
    paths += [write(to_c(tiled, name=name), tmp_path).name for name in ("repeat", "tile")]
    done = subprocess.run(
        [tool("gcc"), *STRICT, "-fsyntax-only", *paths], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_memory_that_no_int_counts_is_refused() -> None:
    large = dataclasses.replace(TINY, input=dataclasses.replace(TINY.input, height=2**13, width=2**13))
    with pytest.raises(DeployError, match="the workspace has .* bytes: expected fewer than 2,147,483,648"):
        to_c(large, name="net")


def test_each_kernel_is_in_the_file_once() -> None:
    steps = [Convolve(f"r{index + 1}", f"r{index}", StoredKernel("k"), padding=(1, 1, 1, 1)) for index in range(5)]
    first = dataclasses.replace(steps[0], x="x")
    of = program(first, *steps[1:-1], dataclasses.replace(steps[-1], out="y"), k=K)
    text = to_c(of, name="net").source
    assert text.count(floats(blocked(K, 1))) == 1
    assert len(text) - len(to_c(TINY, name="net").source) < 4 * 300


def test_the_same_program_gives_the_same_text() -> None:
    assert to_c(TINY, name="net") == to_c(TINY, name="net")


def test_the_file_says_where_it_comes_from() -> None:
    files = signed(to_c(TINY, name="net"), TINY, Parity(5, 2e-7, 1.0, 0), "float32")
    for text in (files.source, files.header, files.example):
        head = text[: text.index("*/")]
        assert "tiny, written by dacnn" in head and weights_hash(TINY.tensors) in head
        assert "kernels are written in float32" in head
        assert "checked on 5 images" in head and "2.0e-07" in head and "100.00%" in head
        assert "12 x 10 x 3, those of another size fitted to it by 'pad'" in head and "mean 0.5 0.4 0.3" in head


def test_the_hash_is_that_of_names_shapes_and_numbers() -> None:
    hashes = {
        weights_hash(tensors)
        for tensors in ({"a": K}, {"b": K}, {"a": K.reshape(-1)}, {"a": K + 1}, {"a": np.asfortranarray(K)}, {"a": K.copy()})
    }
    assert len(hashes) == 4


def test_loops_are_refused() -> None:
    rolled = program(Loop((2,), (Carried("y", "x", "r"),), (Convolve("r", "y", StoredKernel("k"), padding=(1, 1, 1, 1)),)), k=K)
    with pytest.raises(DeployError, match="has loops"):
        to_c(rolled, name="net")


def test_no_heap_and_no_state_that_changes(tmp_path: Path) -> None:
    path = write(to_c(TINY, name="net"), tmp_path)
    subprocess.run([tool("gcc"), "-std=c99", "-O1", "-fno-pie", "-c", path.name], cwd=tmp_path, check=True)
    symbols = subprocess.run([tool("nm"), "net.o"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    kinds = {line.split()[-1]: line.split()[-2] for line in symbols.splitlines()}
    # B, b, C, D, d: memory that can be written; U: what others must give
    assert [name for name, kind in kinds.items() if kind in "BbCDd"] == []
    assert {name for name, kind in kinds.items() if kind == "U"} <= {"memcpy", "memset", "strcmp", "__cpu_model"}
    assert {name for name, kind in kinds.items() if kind in "TR"} == {
        "net_init",
        "net_init_path",
        "net_path",
        "net_run",
        "net_class_names",
    }
