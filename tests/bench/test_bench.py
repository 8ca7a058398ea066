"""The bench measures whoever can run, in turn, and says of the others why they cannot."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dacnn
import stand_ins
from c_networks import tool
from dacnn.bench import contenders
from dacnn.bench.child import Child
from dacnn.bench.contenders import CONTENDERS, chosen
from dacnn.bench.measuring import in_turn, run_bench
from dacnn.bench.results import Bench, Latency
from dacnn.bench.settings import Settings
from dacnn.cli import main
from dacnn.errors import ArtefactError, ConfigError, UnknownNameError
from dacnn.tables import bench_table, show
from stand_ins import stand_in

PNG = b"\x89PNG\r\n"
MIB = 2**20
# torch.compile would take a minute
PEERS = ("openvino", "executorch", "litert", "ncnn")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes find the stand-ins."""
    places = [str(Path(stand_ins.__file__).parent), str(Path(dacnn.__file__).parent.parent)]
    monkeypatch.setenv("PYTHONPATH", ":".join(places))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "network.safetensors"
    dacnn.save(dacnn.create("dacnn3", width=16, seed=0), path)
    return path


def images(count: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def compete(monkeypatch: pytest.MonkeyPatch, *entrants: contenders.Contender, rounds: int = 1, **settings: object) -> Bench:
    monkeypatch.setattr(contenders, "CONTENDERS", {entrant.name: entrant for entrant in entrants})
    network = dacnn.create("dacnn3", width=8, seed=1).eval()
    return run_bench(network, images(), "noise", Settings(rounds=rounds, batches=(1, 2), **settings))  # type: ignore[arg-type]


def test_the_command_measures_both_sides_and_draws_them(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"bench {weights} --only dacnn-onnx onnxruntime-off --rounds 2 --batch 1 3 --images 8 --json"
    main([*words.split(), "--png", str(tmp_path / "bench.png")])
    table = json.loads(capsys.readouterr().out)
    keys = {
        "network",
        "macs",
        "cpu",
        "threads",
        "rounds",
        "batches",
        "images",
        "source",
        "peak_macs_per_second",
        "twin",
        "rows",
    }
    assert table.keys() == keys and table["source"] == "8 images of noise" and table["images"] == 8 and table["twin"] is None
    assert table["peak_macs_per_second"] > 1e8 and table["cpu"]
    names = [(row["name"], row["side"]) for row in table["rows"]]
    assert names == [(name, side) for side in ("shared", "twin") for name in ("dacnn-onnx", "onnxruntime-off")]
    for row in table["rows"]:
        assert row["failure"] is None and row["version"] and row["file_bytes"] > 1000 and row["memory_bytes"] > 0
        # what ONNX Runtime does not optimise it does not copy; the twin's two layers have one each
        assert row["kernel_copies"] == (2 if row["side"] == "twin" or row["name"] == "dacnn-onnx" else 1)
        # the twin computes what the shared network does: both are compared with the shared one, in float64
        assert row["top1_agreement"] == 1 and row["max_error"] < 1e-5
        assert [latency["batch"] for latency in row["latencies"]] == [1, 3]
        for latency in row["latencies"]:
            assert 0 < latency["low_seconds"] <= latency["seconds"] <= latency["high_seconds"] and latency["peak_share"] > 0
    shared, twin = (row["file_bytes"] for row in table["rows"] if row["name"] == "dacnn-onnx")
    assert shared < twin
    assert (tmp_path / "bench.png").read_bytes().startswith(PNG)


def test_int8_is_measured_beside_that_of_onnx_runtime(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(f"bench {weights} --only dacnn-c-int8 onnxruntime-int8 --rounds 1 --batch 1 --images 8 --json".split())
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows if row["side"] == "shared"] == ["dacnn-c-int8", "onnxruntime-int8"]
    for row in rows:
        assert row["failure"] is None and 0 < row["max_error"] < 0.5


def test_what_is_missing_fails_or_dies_is_a_row_that_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = compete(
        monkeypatch,
        stand_in("works", "load_holds"),
        stand_in("missing", "load_holds", modules=("json", "no_such_runtime"), extra="peers"),
        stand_in("unwritten", "load_holds", writer="write_fails"),
        stand_in("wrong", "load_wrong_shape"),
        stand_in("dies", "load_dies"),
        rounds=3,
    )
    rows = {(row.contender.name, row.side): row for row in bench.rows}
    for side in ("shared", "twin"):
        found = {name: rows[name, side].failure for name in ("works", "missing", "unwritten", "wrong", "dies")}
        assert found == {
            "works": None,
            "missing": "not installed: no-such-runtime: pip install 'dacnn[peers]'",
            "unwritten": "cannot be written: ValueError: no such",
            "wrong": "gave (5, 11) for logits: expected (5, 10), all of them finite",
            "dies": "crashed: exit status 7: the last words",
        }
        works = rows["works", side]
        assert works.file_bytes == 8 and [latency.batch for latency in works.latencies] == [1, 2]
    show(bench_table(bench))
    printed = capsys.readouterr().out
    assert "missing (twin): not installed" in printed and "unshared twin" in printed and printed.count("works") == 2
    assert not re.search("^dies .*%", printed, re.MULTILINE)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps_rollup")
def test_memory_is_what_the_artefact_adds_behind_a_tiny_one(monkeypatch: pytest.MonkeyPatch) -> None:
    row = compete(monkeypatch, stand_in("holds", "load_holds")).rows[0]
    # 64 MiB, and what Python may take on the way
    assert row.memory_bytes is not None and 64 * MIB <= row.memory_bytes < 66 * MIB


def test_contenders_take_turns_and_get_the_images_that_they_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(stand_ins.LOG, str(tmp_path / "log"))
    compete(monkeypatch, stand_in("one", "load_notes", takes="uint8"), stand_in("two", "load_notes"), rounds=3)
    lines = [line.split(" ", 3) for line in (tmp_path / "log").read_text().splitlines()]
    assert {(kind, shape) for _, _, kind, shape in lines} == {("uint8", "(32, 32, 3)"), ("float32", "(3, 32, 32)")}
    turns = [pid for index, (pid, *_) in enumerate(lines) if index == 0 or lines[index - 1][0] != pid]
    one, two, one_twin, two_twin = turns[:4]
    # each prepares; then forth, back and forth again, where the last of a round begins the next
    assert turns[4:] == [one, two, one_twin, two_twin, one_twin, two, one, two, one_twin, two_twin]


def test_rounds_go_forth_and_back() -> None:
    assert [list(in_turn([1, 2, 3], number)) for number in range(3)] == [[1, 2, 3], [3, 2, 1], [1, 2, 3]]


def test_a_latency_is_the_median_of_the_rounds_medians() -> None:
    latency = Latency.of(4, [[1, 2, 9], [3, 3, 3], [8, 7, 6]], macs=30, peak_macs_per_second=80)
    assert (latency.seconds, latency.low_seconds, latency.high_seconds) == (3, 2, 7)
    assert latency.peak_share == 4 * 30 / 3 / 80


def test_who_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    with Child(1, tmp_path / "log") as child:
        arguments = {"load": "stand_ins:load_sleeps", "folder": str(tmp_path), "tiny": None, "into": None, "threads": 1}
        np.save(tmp_path / "images.npy", images().numpy())
        with pytest.raises(ArtefactError, match=r"took longer than 5 s to load"):
            child.ask("load", 5, images=str(tmp_path / "images.npy"), tiny_images="", **arguments)
    assert child.process.returncode is not None
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def check_alone(*names: str, error: float = 1e-5) -> None:
    """They give what float64 gives, up to a share of the largest logit, of a network that has no twin to run as well."""
    network = dacnn.create("dacnn3", width=16, share="none", seed=0).eval()
    bench = run_bench(network, images(), "noise", Settings(1, (1, 3), 1, names))
    assert [row.contender.name for row in bench.rows] == list(names) and bench.twin == "it shares no kernel: it is its own twin"
    for row in bench.rows:
        assert row.failure is None and row.top1_agreement == 1 and row.max_error is not None and row.max_error < error


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_the_same(name: str) -> None:
    if missing := CONTENDERS[name].missing():
        pytest.skip(missing)
    check_alone(name)


def test_back_ends_of_ours_compute_the_same() -> None:
    check_alone("dacnn-pack", "dacnn-pt2", "dacnn-loop-small", "dacnn-loop-fast", "pytorch")


def test_compiled_c_computes_the_same() -> None:
    tool("gcc")
    check_alone("dacnn-c")
    check_alone("dacnn-c-bfloat16", error=0.05)
    check_alone("dacnn-c-int8", error=0.1)


def test_a_process_of_another_runtime_has_no_pytorch() -> None:
    code = "import sys, dacnn.bench.worker, dacnn.bench.onnx_backends, dacnn.bench.peers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_contender_has_a_name_of_its_own() -> None:
    assert len(chosen(())) == len(contenders._ALL) == len(CONTENDERS)
    assert [contender.name for contender in chosen(("ncnn", "dacnn-onnx"))] == ["dacnn-onnx", "ncnn"]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="--threads is 0: expected 1 or more"):
        Settings(threads=0)
    with pytest.raises(ConfigError, match="--batch is empty: expected sizes of 1 or more"):
        Settings(batches=())
    with pytest.raises(UnknownNameError, match="unknown contender 'onnxruntim': did you mean 'onnxruntime'"):
        Settings(only=("onnxruntim",))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bench nowhere", "nowhere: no such file"),
        ("bench {} --only ncn", "unknown contender 'ncn': did you mean 'ncnn'"),
        ("bench {} --batch 1 0", "--batch is 1 0: expected sizes of 1 or more"),
        ("bench {} --rounds 0", "--rounds is 0: expected 1 or more"),
        ("bench {} --images 0", "--images is 0: expected 1 or more"),
        ("bench {} --png bench.bmp", "bench.bmp: a picture ends in one of"),
        ("bench {} --data cifar11", "unknown data set 'cifar11'"),
        ("bench {} --data digits --into nets.py:make", "leave out the module"),
    ],
)
def test_bad_input_is_one_clear_line(words: str, message: str, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words.format(weights).split())
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert message in captured.err and captured.err.startswith("dacnn: error: ") and captured.err.count("\n") == 1
