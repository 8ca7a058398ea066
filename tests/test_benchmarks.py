"""The scripts that results come from run to their end, small; what they measure is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import dacnn
from c_networks import tool

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *words: str) -> dict | list:
    command = [sys.executable, str(BENCHMARKS / script), *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_table_that_was_cut_off_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    words = ("digits", "--data", "digits", "--out", str(tmp_path), "--epochs", "1", "--width", "8", "--seeds", "2")
    assert run("table.py", *words, "--minutes", "0") == []
    states = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/resume.safetensors")}
    assert len(states) == 1
    measured = run("table.py", *words)
    assert [result["seed"] for result in measured] == [0, 1]
    states = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/resume.safetensors")}
    assert run("table.py", *words) == measured
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/resume.safetensors")} == states


def test_the_table_of_schemes_is_drawn(tmp_path: Path) -> None:
    words = ("--out", str(tmp_path), "--epochs", "1", "--width", "8", "--seeds", "1", "--png", str(tmp_path / "schemes.svg"))
    measured = run("table.py", "schemes", "--data", "digits", *words, "--only", "one kernel", "2 templates + regulators")
    assert [result["label"] for result in measured] == ["one kernel", "2 templates + regulators"]
    assert (tmp_path / "schemes.svg").read_text().startswith("<?xml")


def test_the_training_benchmark_compares_both_sides() -> None:
    table = run("training.py", "--width", "8", "--batch-size", "16", "--steps", "2", "--rounds", "1")
    assert table["speed_ratio"] > 0 and table["memory_ratio"] > 0 and table["input_share"] > 0


def test_the_benchmark_of_convolutions_compares_both_sides() -> None:
    layers = run("convolution.py", "--channels", "4", "128", "--sides", "8", "--rounds", "1")["layers"]
    assert [layer["chosen"] for layer in layers] == [False, True]
    assert all(layer["ratio"] > 0 for layer in layers)


def test_the_benchmark_of_activation_memory_compares_both_sides() -> None:
    words = (
        "--network",
        "dacnn18",
        "--depths",
        "3",
        "2",
        "--width",
        "8",
        "--batch-size",
        "16",
        "--steps",
        "1",
        "--rounds",
        "1",
    )
    table = run("activation_memory.py", *words)
    assert table["memory_ratio"] > 0 and table["time_ratio"] > 0
    assert "segments of" in table["runs"]["dacnn"][0]["segments"]


def test_the_conversion_benchmark_times_every_rule_with_every_start() -> None:
    table = run("conversion.py", "--width", "4", "--side", "32", "--rounds", "1")["rows"]
    built, *converted = table
    assert {(row["rule"], row["start"]) for row in converted} >= {("all", "first"), ("stage", "mean"), ("isomorphic", "fit")}
    assert all(row["seconds"] > 0 for row in table)
    assert all(row["stored_parameters"] < built["stored_parameters"] for row in converted)


def test_the_benchmark_of_the_onnx_loop_compares_every_form_with_the_plain_one() -> None:
    rows = run("onnx_loop.py", "--width", "8", "--rounds", "1", "--runs", "1", "--fresh", "1")["rows"]
    assert [row["form"] for row in rows] == ["plain", "small", "fast"] * 2
    assert all(row["seconds"] > 0 and row["time_ratio"] > 0 and row["file_bytes"] > row["stored_bytes"] for row in rows)


def test_the_benchmark_of_packed_networks_compares_both_sides() -> None:
    sizes = "--network", "dacnn3", "--width", "8", "--batches", "1", "--rounds", "3", "--repeats", "1"
    table = run("packed.py", *sizes, "--ways", "float32", "c")
    for rows in table["latency"].values():
        assert set(rows) == {"onnxruntime", "float32", "c"}
        assert all(row["times_as_fast"] > 0 and row["largest_difference"] < 1e-4 for row in rows.values())
    assert set(table["memory"]) == {"onnxruntime", "float32", "c"}


def test_the_benchmark_of_packed_networks_on_a_gpu_compares_every_way() -> None:
    # compiled ways take a minute to compile
    words = ("--device", "cpu", "--ways", "pack", "eager", "--width", "8", "--batches", "2", "--rounds", "2")
    ways = run("packed_gpu.py", *words)["ways"]
    assert set(ways) == {f"{way}, {dtype}" for way in ("pack", "eager") for dtype in ("float32", "bfloat16")}
    assert ways["pack, float32"]["error"] < 1e-5 and all(way["milliseconds"]["2"] > 0 for way in ways.values())


def test_the_benchmark_of_many_networks_counts_the_memory_of_each() -> None:
    table = run("many_networks.py", "--network", "dacnn3", "--width", "8", "--count", "5", "--dtypes", "float32")
    (row,) = table["rows"]
    assert row["count"] == 5 and row["pack_seconds"] > 0 and row["held_bytes"] > 0


def test_the_benchmark_of_exactness_compares_every_back_end_with_float64(tmp_path: Path) -> None:
    dacnn.train("dacnn3", data="digits", width=8, epochs=1, batch_size=256, out=tmp_path / "run")
    reference, *rows = run("exactness.py", str(tmp_path / "run"), "--images", "30")["rows"]
    assert 0 <= reference["top1"] <= 1 and len(rows) == 8
    assert all(row["images"] == 30 for row in rows)
    assert all(
        row["unexplained"] == 0 and row["max_error"] < 1e-5
        for row in rows
        if row["back_end"] not in ("pack, bfloat16", "C, bfloat16", "C, int8")
    )


def test_the_benchmark_of_the_browser_runs_every_number_format() -> None:
    tool("node")
    tool("wasm-ld")
    rows = run("browser.py", "--network", "dacnn3", "--width", "8", "--rounds", "2")["rows"]
    assert set(rows) == {"float32", "bfloat16", "int8"} and rows["float32"]["error"] < 1e-4
    assert all(row["median_ms"] > 0 and row["download_bytes"] > 0 for row in rows.values())


def test_the_benchmark_of_compiled_c_compares_every_path_with_onnx_runtime() -> None:
    words = ("--network", "dacnn3", "--width", "8", "--batch", "2", "--sides", "4", "--rounds", "2", "--repeats", "1")
    table = run("compiled_c.py", *words)
    assert {row["path"] for row in table["whole"]} >= {"onnxruntime", "portable"}
    assert all(row["times_as_fast"] > 0 for row in table["whole"])
    assert set(table["scaling"]) == {"one_by_one", "1_threads", "2_threads"} and min(table["scaling"].values()) > 0
    assert table["memory"]["anonymous_bytes"] > 0 and table["memory"]["stored_bytes"] > 0
