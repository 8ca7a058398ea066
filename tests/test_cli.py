"""Every command, as a user types it: what it prints, its JSON, its one line for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dacnn.cli import main

PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    words = f"train dacnn3 --data digits --width 8 --epochs 1 --batch-size 128 --threads 1 --seed 3 --lr 0.05 --out {out}"
    main(words.split())
    return out


def output(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    main(words.split())
    return capsys.readouterr().out


def refusal(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed on standard error when a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_help_and_version_answer_without_loading_torch() -> None:
    script = (
        "import sys, dacnn.cli\n"
        "for words in (['--help'], ['train', '--help'], ['--version']):\n"
        "    try: dacnn.cli.main(words)\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Train a network on images" in done.stdout


COMMANDS = ["train", "eval", "predict", "models", "show", "plan", "fold", "count", "export", "audit", "bench"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"Example: dacnn {command}" in text and "--json" in text


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "dacnn", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dacnn ")


def test_train_says_where_the_weights_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"train dacnn3 --data digits --width 8 --epochs 1 --batch-size 256 --threads 1 --out {tmp_path / 'run'} --json"
    table = json.loads(output(words, capsys))
    assert table["weights_bytes"] == Path(table["weights"]).stat().st_size
    assert table["stored_parameters"] < table["used_parameters"]
    assert len(table["epochs"]) == 1


def test_eval_measures_the_test_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = json.loads(output(f"eval {run} --json", capsys))
    assert table["images"] == 359 and 0 <= table["top1"] <= table["top5"] <= 1
    assert table.keys() >= {"loss", "per_class", "confusion", "stored_parameters", "used_parameters", "macs"}
    assert sum(map(sum, table["confusion"])) == 359
    text = output(f"eval {run}/best.safetensors --data digits --png {tmp_path / 'confusion.png'}", capsys)
    assert f"top-1 {table['top1']:.2%}" in text
    assert (tmp_path / "confusion.png").read_bytes().startswith(PNG)


def test_predict_names_the_likeliest_classes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        Image.fromarray(np.full((20, 30), 99, np.uint8)).save(tmp_path / f"{name}.png")
    rows = json.loads(output(f"predict {run} {tmp_path} --top 10 --json", capsys))
    assert [Path(row["path"]).name for row in rows] == ["one.png", "two.png"]
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)
    assert rows[0]["class"] == max(rows[0]["probabilities"], key=rows[0]["probabilities"].get)
    assert rows[0]["class"] in output(f"predict {run} {tmp_path / 'one.png'}", capsys)


def test_models_lists_the_papers_counts(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in json.loads(output("models --json", capsys))}
    assert rows["dacnn14"]["stored_parameters"] == 167_140
    assert rows["resnet18"]["used_parameters"] == rows["resnet18"]["stored_parameters"] == 11_220_132
    assert "167,140" in output("models", capsys)


def test_show_tells_who_reads_which_kernel(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = json.loads(output("show dacnn18-mix-reg --classes 100 --json", capsys))
    assert table["stored_parameters"] == 5_612_708
    assert table["readers"]["width64"] == [f"stage0.block{block}.conv{conv}" for block in (0, 1) for conv in (0, 1)]
    text = output(f"show dacnn14 --width 16 --depths 2 1 1 --png {tmp_path / 'plan.png'}", capsys)
    assert "width16" in text and (tmp_path / "plan.png").read_bytes().startswith(PNG)
    assert json.loads(output(f"show {run} --json", capsys))["plan"]["name"] == "dacnn3"


def test_show_prints_the_steps_that_run_elsewhere(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output("show dacnn14 --width 8 --steps", capsys)
    assert "loop 1, 2, 3, 3, 3 times" in text and text.count("with anchors.width8") == 1
    table = json.loads(output(f"show {run} --steps --json", capsys))
    assert table["steps"][0].startswith("dacnn3: uint8 images of 32x32x1") and table["stored_parameters"] > 0


@pytest.mark.parametrize("to", ["onnx", "onnx-loop --form fast", "onnx-loop --input float", "pt2"])
def test_export_writes_a_file_and_says_how_exact_it_is(
    to: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = json.loads(output(f"export {run} --to {to} --out {tmp_path / 'file'} --images 20 --json", capsys))
    assert table["file_bytes"] == (tmp_path / "file").stat().st_size
    assert table["compared_on"] == "20 test images of digits" and table["parity"]["images"] == 20
    assert table["parity"]["max_error"] < 1e-5 and table["parity"]["top1_agreement"] == 1
    bare = (run / "best.safetensors").rename(tmp_path / "bare.safetensors")
    text = output(f"export {bare} --to {to} --out {tmp_path / 'file'}", capsys)
    bare.rename(run / "best.safetensors")
    assert "256 images of noise" in text and "100.00%" in text


def test_an_export_in_int8_is_calibrated_on_train_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--to c --dtype int8 --out {tmp_path / 'net.c'} --images 20"
    table = json.loads(output(f"export {run} {words} --json", capsys))
    assert table["ranges_from"] == "512 train images of digits" and 1e-5 < table["parity"]["max_error"] < 0.2
    bare = (run / "best.safetensors").rename(tmp_path / "bare.safetensors")
    text = output(f"export {bare} {words} --calibrate digits", capsys)
    bare.rename(run / "best.safetensors")
    assert "512 train images of digits" in text and "20 images of noise" in text


def test_count_sets_a_network_beside_its_twin_and_its_rival(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "count dacnn14 --width 16 --batch-size 8 --precision float32 --optimizer adamw"
    table = json.loads(output(f"{words} --measure --json", capsys))
    assert table["training"]["batch_size"] == 8 and table["execution"]["precision"] == "float32"
    network, twin, rival = table["columns"]
    assert network["stored_parameters"] < network["used_parameters"] == twin["stored_parameters"]
    assert rival["stored_parameters"] <= network["stored_parameters"] and rival["width"] < network["width"] == twin["width"]
    for column in table["columns"]:
        memory = column["training"]
        assert memory["ratio"] == pytest.approx(1, abs=0.1)
        assert memory["ratio"] == memory["peak_bytes"] / memory["measured_peak_bytes"]
    text = output(words, capsys)
    assert f"{network['macs']:,}" in text and f"width {rival['width']}" in text and "measured" not in text
    columns = json.loads(output(f"count {run} --batch-size 4 --json", capsys))["columns"]
    assert columns[0]["name"] == "dacnn3" and "ratio" not in columns[0]["training"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train dacnn15", "unknown network 'dacnn15': did you mean"),
        ("train --recipe quick", "unknown recipe 'quick'"),
        ("train --data cifar11 --recipe digits", "unknown data set 'cifar11'"),
        ("train --epochs 0", "training.epochs is 0"),
        ("train --resume", "name its directory with --out"),
        ("eval nowhere", "nowhere: no such file"),
        ("export nowhere --to onnx --out net.onnx", "nowhere: no such file"),
        ("predict nowhere photo.png", "nowhere: no such file"),
        ("show dacnn14 --size 16", "input of 16x16 is too small"),
        ("show dacnn14 --png plan.bmp", "a picture ends in one of"),
        ("show dacnn14 --regulator low-rank", "has no rank: give one"),
        ("models --classes 0", "has no classes"),
        ("count dacnn15", "unknown network 'dacnn15': did you mean"),
        ("count dacnn14 --batch-size 0", "training.batch_size is 0"),
        ("count dacnn18 --width 2 --depths 25 25 25 25", "it has no rival, make it wider"),
    ],
)
def test_bad_input_is_one_clear_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refusal(words, capsys)
    assert message in error and error.startswith("dacnn: error: ") and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.glob("plan*"))


def test_a_flag_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--epoch" in refusal("train --epoch 3", capsys)


@pytest.mark.parametrize(
    "words", ["train --optimizer None", "train --width None", "export run --to onnx --out net.onnx --form None"]
)
def test_leaving_a_flag_out_is_no_word_for_its_value(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(words, capsys)
    assert "('sgd'," in error or "('small'," in error or "invalid literal for int()" in error
    assert "None'" not in error.replace("'None' for argument", "").replace("base 10: 'None'", "") and "NoneType" not in error


def test_an_export_without_images_or_with_a_form_it_has_not_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"export {run} --to onnx --out {tmp_path / 'net.onnx'}"
    assert "images is 0: expected 1 or more" in refusal(f"{words} --images 0", capsys)
    assert "form is 'fast', but 'onnx' has no forms" in refusal(f"{words} --form fast", capsys)
    # before anything is loaded
    assert "form is 'fast'" in refusal(f"export nowhere --to onnx --out {tmp_path / 'net.onnx'} --form fast", capsys)
    assert "there is no folder" in refusal(f"export {run} --to onnx --out {tmp_path / 'no' / 'net.onnx'}", capsys)
    assert "unknown data set 'cifar11'" in refusal(f"{words} --data cifar11", capsys)
    assert not list(tmp_path.iterdir())
