"""A user's own network on the command line: every command, its table, its JSON, its one line for bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dacnn.cli import main
from factories import FILE, GROUPS, KERNEL_PARAMETERS
from reference import one_thread  # noqa: F401  (a fixture)

CHAIN = f"{FILE}:chain"
# 5 steps
SMALL = "--data digits --epochs 1 --batch-size 256 --threads 1 --precision float32 --crop 0"
COUNTS = {"stored_parameters", "used_parameters", "stored_bytes", "macs"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "chain"
    main(f"train {CHAIN} --share all {SMALL} --out {out}".split())
    return out


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "zoo"
    main(f"train dacnn3 --width 4 {SMALL} --out {out}".split())
    return out


def output(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    main(words.split())
    return capsys.readouterr().out


def table(words: str, capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(output(f"{words} --json", capsys))


def refusal(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    captured = capsys.readouterr()
    *before, last = captured.err.splitlines()
    # what a training says of the machine before it looks at the network
    assert captured.out == "" and last.startswith("dacnn: error: ") and len(before) <= 1, captured.err
    return last


# ---------------------------------------------------------------- train, eval, predict


@pytest.mark.parametrize(
    ("flags", "stored"),
    [
        ("--share none", 0),
        ("--share all", 4),
        ("--share stage", 3),
        ("--share isomorphic", 2),
        ("--groups a.0+b.0 c.0+d.0+e.0", 3),
        ("--share all --start fit", 4),
    ],
)
def test_train_shares_as_it_is_told(flags: str, stored: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = table(f"train {CHAIN} {flags} {SMALL} --out {tmp_path / 'run'}", capsys)
    assert result["used_parameters"] - result["stored_parameters"] == stored * KERNEL_PARAMETERS
    assert result["weights_bytes"] == Path(result["weights"]).stat().st_size
    assert len(result["epochs"]) == 1 and result.keys() >= {"run", "weights", "best_validation_top1", *COUNTS}


def test_train_regulates_and_combines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--share template --templates 2 --regulator low-rank --regulator-rank 1"
    main(f"train {CHAIN} {words} {SMALL} --out {tmp_path / 'run'}".split())
    shown = table(f"show {tmp_path / 'run'} --into {CHAIN}", capsys)
    assert (shown["templates"], shown["regulator"], shown["regulator_rank"]) == (2, "low-rank", 1)
    assert list(map(tuple, shown["groups"].values())) == GROUPS["template"]


def test_train_says_how_to_go_on(run: Path, zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    main(f"train --resume --out {run}".split())
    text = "".join(capsys.readouterr().out.split())
    assert f"dacnneval{run}--into{CHAIN}" in text
    assert f"dacnneval{zoo}" in "".join(output(f"train --resume --out {zoo}", capsys).split())


def test_eval_measures_a_trained_network_and_an_untrained_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = table(f"eval {run} --into {CHAIN}", capsys)
    assert result["images"] == 359 and 0 <= result["top1"] <= result["top5"] <= 1
    assert result.keys() >= {"data", "loss", "per_class", "confusion", *COUNTS}
    png = tmp_path / "confusion.png"
    text = output(f"eval {run}/last.safetensors --into {FILE}:fixed --data digits --png {png}", capsys)
    assert f"top-1 {result['top1']:.2%}" in text and png.stat().st_size > 0
    untrained = table(f"eval {CHAIN} --data digits --share all", capsys)
    assert untrained["stored_parameters"] == result["stored_parameters"] and untrained["images"] == 359
    plain = table(f"eval {FILE}:fixed --data digits", capsys)
    assert plain["stored_parameters"] == plain["used_parameters"] == result["used_parameters"]


def test_predict_names_the_likeliest_classes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.full((20, 30), 99, np.uint8)).save(tmp_path / "one.png")
    (row,) = table(f"predict {run} {tmp_path} --into {CHAIN} --top 10", capsys)
    assert sum(row["probabilities"].values()) == pytest.approx(1)
    assert row["class"] in output(f"predict {run} {tmp_path / 'one.png'} --into {FILE}:fixed", capsys)


# ---------------------------------------------------------------- show, plan


def test_show_tells_who_reads_which_kernel(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = table(f"show {CHAIN} --share stage --in-channels 1 --classes 10", capsys)
    assert list(map(tuple, shown["groups"].values())) == GROUPS["stage"]
    assert shown.keys() >= {"groups", "refused", *COUNTS}
    text = output(f"show {CHAIN} --share stage --regulator shift", capsys)
    assert "c.0, d.0, e.0 (+ shift)" in text and "8x8x3x3" in text
    trained = table(f"show {run} --into {CHAIN}", capsys)
    assert list(map(tuple, trained["groups"].values())) == GROUPS["all"]
    assert "a.0, b.0, c.0, d.0, e.0" in output(f"show {run}/best.safetensors --into {FILE}:fixed", capsys)
    assert list(map(tuple, table(f"show {FILE}:anchored", capsys)["groups"].values())) == GROUPS["all"]


def test_show_tells_what_cannot_share_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"show {FILE}:Tied --in-channels 1 --classes 10 --share all"
    shown = table(words, capsys)
    assert set(shown["refused"]) == {"first", "second"}
    assert "first: not shared, it holds a weight that other layers hold too" in " ".join(output(words, capsys).split())


def test_long_names_of_layers_are_printed_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a_module_with_a_name_that_is_quite_long"
    (tmp_path / "net.py").write_text(
        f"import factories\nfrom torch import nn\n\ndef make():\n"
        f"    inner = nn.Sequential()\n    inner.{name}_a = factories.block(1, 8)\n    inner.{name}_b = factories.block(8, 8)\n"
        f"    inner.{name}_c = factories.block(8, 8)\n    inner.end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        f"    outer = nn.Sequential()\n    outer.{name} = inner\n    return outer\n"
    )
    text = output(f"show {tmp_path}/net.py:make --classes 8 --in-channels 1 --share all", capsys)
    assert f"{name}.{name}_c.0" in "".join(text.split())


def test_plan_compares_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    result = table(f"plan {CHAIN} --in-channels 1", capsys)
    rows = result["proposals"]
    assert result["chosen"] is None
    assert rows[0].keys() == {"settings", "kernels", "readers", "stored_parameters", "stored_bytes", "flags"}
    sizes = [row["stored_bytes"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    text = output(f"plan {CHAIN} --in-channels 1 --dtype int8", capsys)
    assert "values in int8" in text and "--share template --templates 2" in text and "100.0%" in text


@pytest.mark.parametrize("command", ["plan", "count", "show"])
def test_a_factory_that_nobody_tells_how_many_classes_there_are_has_its_own(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output(f"{command} {FILE}:seven_classes --in-channels 1", capsys)
    # one that takes an argument and has a default, and one that has none
    for name in ("chain", "lazy"):
        told, untold = (output(f"{command} {FILE}:{name} --in-channels 1{more}", capsys) for more in (" --classes 10", ""))
        assert told == untold


def test_plan_chooses_what_train_then_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = table(f"plan {CHAIN} --in-channels 1 --budget 9kB", capsys)
    assert result["chosen"]["stored_bytes"] <= 9000
    flags = result["chosen"]["flags"].replace("'", "")
    trained = table(f"train {CHAIN} {flags} {SMALL} --out {tmp_path / 'run'}", capsys)
    assert trained["stored_bytes"] == result["chosen"]["stored_bytes"]
    assert f"fits 9kB: {result['chosen']['flags']}" in output(f"plan {CHAIN} --in-channels 1 --budget 9kB", capsys)


def test_plan_of_a_way_that_is_named_and_of_the_zoo(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [row["flags"] for row in table(f"plan {CHAIN} --share template --templates 3", capsys)["proposals"]]
    assert flags == ["--share none", "--share template --templates 3"]
    flags = [row["flags"] for row in table("plan dacnn14 --width 8", capsys)["proposals"]]
    assert "--share repeat" in flags and len(flags) == 7
    result = table("plan dacnn14 --width 8 --budget 20kB --dtype int8 --regulator pointwise", capsys)
    assert result["chosen"]["stored_bytes"] <= 20_000


@pytest.mark.parametrize(
    ("flags", "readers"),
    [
        ("--share template --templates 2", {"width4": 12, "stem": 1}),
        ("--share repeat --base-width 2", {"base": 12, "stem": 1}),
        ("--groups stage1.*+stage2.*", {"group0": 5}),
        ("--share none --groups stage1.*", {"group0": 2}),
    ],
)
def test_schemes_of_the_zoo(flags: str, readers: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    shown = table(f"show dacnn14 --width 4 {flags}", capsys)
    counted = {name: len(layers) for name, layers in shown["readers"].items()}
    assert readers.items() <= counted.items()


def test_what_a_file_prints_does_not_mix_with_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text("import factories\nprint('loading')\ndef make():\n    return factories.chain(10, 3)\n")
    main(f"show {tmp_path}/net.py:make --classes 10 --json".split())
    captured = capsys.readouterr()
    assert json.loads(captured.out).keys() >= COUNTS and captured.err == "loading\n"


# ---------------------------------------------------------------- one line for bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train absent.py:make", "absent.py:make: no such file: expected FILE.py:factory"),
        ("train {file}", "names no function in the file"),
        ("train {file}:absent", "has no function 'absent'"),
        ("train {file}:fails", "the factory failed: RuntimeError: the first line (factories.py, line "),
        ("train {file}:nothing", "the factory gave a NoneType: expected an nn.Module"),
        ("train {file}:needs_width", "missing 1 required positional argument: 'width'"),
        ("train {file}:leaves", "the factory failed: SystemExit: 3"),
        ("train {file}:seven_classes", "gives (2, 7) for 2 images: expected logits of shape (2, 10)"),
        ("train {file}:GivesDict", "GivesDict gives dict for 2 images"),
        ("train {file}:three_channels", "does not run on images of N x 1 x 32 x 32: RuntimeError"),
        ("train {file}:frozen", "nothing in the network learns"),
        ("train {file}:Stateful", "a .safetensors file"),
        ("train broken.py:make", "broken.py: cannot be run: SyntaxError: "),
        ("train {file}:chain --width 8", "network.width is 8: it changes networks of the zoo"),
        ("train {file}:chain --depths 1 2", "network.depths is (1, 2): it changes networks of the zoo"),
        ("train {file}:chain --share repeat", "only networks of the zoo can tile a kernel"),
        ("train {file}:chain --templates 2", "expected 'template'"),
        ("train {file}:chain --share all --groups a.0+b.0", "leave one of them out"),
        ("train {file}:chain --groups a.0+absent", "names 'absent', which is no layer"),
        ("train {file}:chain --share all --regulator pointwize", "did you mean 'pointwise'"),
        ("train {file}:chain --share all --batch-size 5000", "use a smaller batch size"),
        ("train python:Net", "was given from Python"),
        ("train dacnn3 --templates 2", "network.templates is 2, but network.share is 'all': expected 'template'"),
        ("train dacnn3 --share repeat --templates 2", "network.templates is 2, but network.share is 'repeat'"),
        (
            "train dacnn3 --share stage --base-width 2",
            "network.base_width is 2, but network.share is 'stage': expected 'repeat'",
        ),
        ("train dacnn3 --start mean", "network.start is 'mean': kernels of the zoo are drawn"),
        ("show dacnn14 --groups stage1.*+absent", "names 'absent', which is no layer"),
        ("show dacnn14 --share repeat --base-width 3", "no tiling of base 'base'"),
        ("show {file}:chain --png plan.png", "--png: "),
        ("show {file}:fixed", "does not run on images of N x 3 x 32 x 32"),
        ("show {file}:chain --share all --regulator low-rank", "has no rank: give one"),
        ("show {file}:chain --start fit", "but nothing is shared"),
        ("eval {file}:chain", "makes a network that saw no data set: name one with --data"),
        ("eval {file}:chain --data digits --into {file}:chain", "leave out --into"),
        ("eval {file}:chain --data cifar11", "unknown data set 'cifar11'"),
        ("eval absent --into {file}:chain", "absent: no such file"),
        ("predict {file}:chain photo.png", "no such file"),
        ("plan {file}:chain --budget 5parsecs", "a budget of '5parsecs': expected a size such as 100kB"),
        ("plan {file}:chain --budget 0", "a budget of '0'"),
        ("plan {file}:chain --budget 1kB", "--share all is the smallest and stores "),
        ("plan {file}:chain --width 8", "network.width is 8: it changes networks of the zoo"),
        ("plan {file}:anchored", "shares by anchors already"),
        ("plan dacnn15", "unknown network 'dacnn15': did you mean"),
        ("plan absent.py:make", "absent.py:make: no such file"),
    ],
)
def test_bad_input_is_one_clear_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def make(:\n")
    words = words.format(file=FILE)
    assert message in refusal(words + (" --data digits" if words.startswith("train") else ""), capsys)
    assert {path.name for path in tmp_path.iterdir()} <= {"broken.py", "__pycache__"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval {run}", "dacnn.load(path, into=factory()), or --into FILE.py:factory"),
        ("predict {run} photo.png", "--into FILE.py:factory"),
        ("show {run}", "--into FILE.py:factory"),
        ("fold {run} --out folded.safetensors", "--into FILE.py:factory"),
        ("eval {run} --into {file}:Views", "the module has no layer 'a.0' that can share a kernel"),
        ("eval {run} --into {file}:seven_classes", "tensor 'head.bias' has shape (10,), the network expects (7,)"),
        ("eval {run} --into {file}:fails", "the factory failed: RuntimeError: the first line"),
        ("eval {run} --into absent.py:make", "absent.py:make: no such file"),
        ("eval {run} --into dacnn14", "dacnn14: no such file: expected FILE.py:factory"),
        ("eval {run} --into {file}:chain --share all", "is a trained network: it takes no --share"),
        ("eval {run} --into {file}:chain --size 64", "is a trained network: it takes no --size"),
        ("show {run} --into {file}:chain --regulator-rank 3", "is a trained network: it takes no --regulator-rank"),
        ("show {run} --into {file}:chain --png plan.png", "has no plan to draw"),
        ("eval {zoo} --into {file}:chain", "holds a whole network: leave out the module"),
        ("show {zoo} --into {file}:chain", "holds a whole network: leave out the module"),
        ("train {file}:Views --resume --out {run}", "in this run, got "),
        ("train --share stage --resume --out {run}", "network.share is all in this run, got stage"),
    ],
)
def test_a_trained_network_and_what_does_not_go_with_it(
    words: str,
    message: str,
    run: Path,
    zoo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(words.format(run=run, zoo=zoo, file=FILE), capsys)
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_by_command_in_a_process_of_its_own(run: Path) -> None:
    words = [sys.executable, "-m", "dacnn", "train", "--resume", "--out", str(run), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["epochs"]) == 1


@pytest.mark.parametrize("command", ["plan", "fold", "show", "eval", "predict"])
def test_help_says_what_stands_for_a_factory(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"Example: dacnn {command}" in text and "--json" in text
    assert "FACTORY" in text or "FILE.py:factory" in text or command == "fold"
    assert "--groups STR ..." in text or command in ("fold", "predict")


# ---------------------------------------------------------------- far from the images, and other places where people stumble


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of two classes, 16 pixels a side."""
    folder = tmp_path / "photos"
    for value, name in ((40, "dark"), (200, "light")):
        (folder / name).mkdir(parents=True)
        for index in range(12):
            pixels = np.random.default_rng(index).integers(value, value + 50, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def test_a_small_network_trains_on_small_images_and_is_shipped_without_them(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    settings = "--epochs 1 --batch-size 4 --threads 1 --precision float32 --crop 0 --size 16"
    main(f"train {CHAIN} --share all --data {photos} {settings} --out {out}".split())
    photos.rename(tmp_path / "elsewhere")
    exported = table(f"export {out} --into {CHAIN} --to onnx --out {tmp_path / 'net.onnx'}", capsys)
    assert "images of noise" in exported["compared_on"]
    assert "cannot be read here" in exported["compared_on"]
    line = refusal(f"eval {out} --into {CHAIN}", capsys)
    assert f"so says the config of {out}: name its data set by --data" in line
    assert table(f"eval {out} --into {CHAIN} --data {tmp_path / 'elsewhere'}", capsys)["images"] > 0
    line = refusal(f"export {out} --into {CHAIN} --to c --dtype int8 --out {tmp_path / 'net.c'}", capsys)
    assert "name its data set by --calibrate" in line
    assert not (tmp_path / "net.c").exists()


def test_a_run_is_counted_like_what_it_was_made_from_but_not_planned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counted = table(f"count {run} --into {CHAIN}", capsys)
    made = table(f"count {CHAIN} --share all --classes 10 --in-channels 1", capsys)
    stored = [[column["stored_parameters"] for column in of["columns"]] for of in (counted, made)]
    assert stored[0] == stored[1]
    assert stored[0][0] < stored[0][1]
    assert "shares as it was trained to" in refusal(f"plan {run}", capsys)


def test_paths_that_are_not_there_are_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'nothere': there is no such file or folder" in refusal(f"train {CHAIN} --data nothere --epochs 1", capsys)
    assert "recipe 'mine.toml': no such file" in refusal(f"train {CHAIN} --data digits --recipe mine.toml", capsys)


def test_values_that_are_no_numbers_are_no_measurement(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    weights = load_file(broken / "best.safetensors")
    with safe_open(broken / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    next(tensor for tensor in weights.values() if tensor.ndim == 4).fill_(float("nan"))
    save_file(weights, broken / "best.safetensors", metadata)
    assert "values that are no numbers" in refusal(f"eval {broken} --into {CHAIN}", capsys)


def test_sharing_that_shares_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pair.py"
    file.write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), "
        "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))\n"
    )
    main(f"train {file}:make --share all {SMALL} --out {tmp_path / 'run'}".split())
    captured = capsys.readouterr()
    assert "share 'all': no two layers can read one kernel" in " ".join((captured.out + captured.err).split())
