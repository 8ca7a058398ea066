"""A run goes from images to a directory; killed anywhere, it goes on and ends with the same bits."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dacnn
from dacnn.config import read_config
from dacnn.errors import CheckpointError, ConfigError, DataError, DivergenceError, Interrupted, UnknownNameError
from dacnn.training.listener import Listener
from dacnn.training.loop import Loop
from dacnn.training.run import Run
from dacnn.training.train import configure

# dacnn3 on the digits, small enough for a test: 2 epochs of 10 steps
SMALL = {"width": 8, "epochs": 2, "batch_size": 128, "threads": 1, "precision": "float32", "checkpoint_minutes": 0.0}

# trains in a process of its own and kills it, not to be caught, at the start of a named call
KILLED = """
import os, signal, sys
import dacnn
from dacnn.training.run import Run
from dacnn.training.loop import Loop
target, name, call, out = {"run": Run, "loop": Loop}[sys.argv[1]], sys.argv[2], int(sys.argv[3]), sys.argv[4]
original, calls = getattr(target, name), 0
def deadly(*arguments, **more):
    global calls
    calls += 1
    if calls == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **more)
setattr(target, name, deadly)
small = dict(width=8, epochs=2, batch_size=128, threads=1, precision="float32", checkpoint_minutes=0.0)
dacnn.train("dacnn3", data="digits", out=out, **small)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    dacnn.train("dacnn3", data="digits", out=out, **SMALL)
    return out


def assert_same_run(run: Path, other: Path) -> None:
    """Same weights bit for bit, same measurements (times apart)."""
    for name in ("last.safetensors", "best.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    records = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (run, other)]
    for record in records[0] + records[1]:
        del record["seconds"], record["images_per_second"]
    assert records[0] == records[1]


def test_a_run_directory_holds_all_of_the_run(whole: Path) -> None:
    config = read_config(whole / "config.toml")
    assert (config.network.name, config.network.width, config.training.epochs) == ("dacnn3", 8, 2)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert records[1]["train_loss"] < records[0]["train_loss"]
    assert list((whole / "tensorboard").iterdir())
    tensors = load_file(whole / "best.safetensors")
    assert sum("anchors" in name for name in tensors) == 2
    network = dacnn.load(whole)
    assert network.plan.classes == tuple("0123456789")
    assert network.plan.input.channels == 1


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(whole: Path, tmp_path: Path) -> None:
    dacnn.train("dacnn3", data="digits", out=tmp_path / "again", **SMALL)
    assert_same_run(tmp_path / "again", whole)
    dacnn.train("dacnn3", data="digits", out=tmp_path / "other", **SMALL, seed=1)
    assert (tmp_path / "other" / "last.safetensors").read_bytes() != (whole / "last.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("target", "name", "call"),
    [
        ("loop", "train_epoch", 1),  # before the first step, with no state at all
        ("loop", "_train_step", 6),  # in the middle of the first epoch
        ("loop", "end_epoch", 1),  # between the last step of an epoch and its measurement
        ("run", "save_state", 10),  # weights and metrics of an epoch are written, its state is not
        ("loop", "_train_step", 15),  # in the middle of the second epoch
    ],
)
def test_a_killed_run_ends_with_the_same_bits(target: str, name: str, call: int, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, target, name, str(call), str(out)], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    dacnn.train(out=out, resume=True)
    assert_same_run(out, whole)
    assert not list(out.glob(".*")), "nothing half-written is left"


class Interrupting(Listener):
    """Sends this process a signal in a given step."""

    def __init__(self, epoch: int, step: int, number: int) -> None:
        self.when, self.number = (epoch, step), number

    def stepped(self, epoch: int, step: int, steps: int, loss: float, top1: float) -> None:
        if (epoch, step) == self.when:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("step", "number"), [(3, signal.SIGINT), (10, signal.SIGTERM)])
def test_an_interrupted_run_leaves_its_state_and_goes_on(step: int, number: int, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "interrupted"
    patient = SMALL | {"checkpoint_minutes": 100.0}
    with pytest.raises(Interrupted, match="go on with `dacnn train --resume --out"):
        dacnn.train("dacnn3", data="digits", out=out, listener=Interrupting(1, step, number), **patient)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    dacnn.train(out=out, resume=True)
    assert_same_run(out, whole)


def test_a_finished_run_resumes_to_itself(whole: Path) -> None:
    before = (whole / "last.safetensors").read_bytes()
    result = dacnn.train(out=whole, resume=True)
    assert len(result.records) == 2
    assert (whole / "last.safetensors").read_bytes() == before


def test_a_run_is_not_overwritten(whole: Path) -> None:
    with pytest.raises(CheckpointError, match="already holds a run: go on with it by --resume"):
        dacnn.train("dacnn3", data="digits", out=whole, **SMALL)


def test_two_trainings_do_not_write_into_one_directory(whole: Path, tmp_path: Path) -> None:
    written = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with (
        Run(whole).locked(Run(whole).stamp),
        pytest.raises(CheckpointError, match="another training is at work in it: wait for its end"),
    ):
        dacnn.train(out=whole, resume=True)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == written
    # one that has not begun yet
    with Run(tmp_path / "new").locked((None, None)), pytest.raises(CheckpointError, match="another training is at work"):
        dacnn.train("dacnn3", data="digits", out=tmp_path / "new", **SMALL)
    assert not list((tmp_path / "new").iterdir())
    # one that began and ended since a second one had looked
    with pytest.raises(CheckpointError, match="another training was at work in it meanwhile"), Run(whole).locked((None, None)):
        pass
    # and whoever has ended lets it go
    assert len(dacnn.train(out=whole, resume=True).records) == 2


def test_a_resume_that_would_differ_is_refused_with_the_reason(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "moved"
    out.mkdir()
    for file in whole.iterdir():
        if file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace('precision = "float32"', 'precision = "bfloat16"'))
    with pytest.raises(CheckpointError, match="precision was float32, is bfloat16"):
        dacnn.train(out=out, resume=True)
    (out / "config.toml").write_text(text)
    (out / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: holds 0 epochs, the state is behind epoch 2"):
        dacnn.train(out=out, resume=True)
    (out / "resume.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"resume.safetensors: not a readable"):
        dacnn.train(out=out, resume=True)


def test_settings_that_contradict_the_run_to_resume_are_refused(whole: Path) -> None:
    with pytest.raises(CheckpointError, match="epochs is 2 in this run"):
        dacnn.train(out=whole, resume=True, epochs=3)
    with pytest.raises(ConfigError, match="name its directory with --out"):
        dacnn.train(resume=True)


def test_divergence_stops_with_the_remedy_and_keeps_no_broken_weights(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"lower --lr \(now 1e\+30\)"):
        dacnn.train("dacnn3", data="digits", out=tmp_path / "run", **SMALL, lr=1e30, warmup=0.0)
    for file in (tmp_path / "run").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values() if tensor.is_floating_point())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"batch_size": 4096}, ConfigError, "use a smaller batch size"),
        ({"crop": 32}, ConfigError, r"training.crop is 32: expected less than the side"),
        ({"epochs": 0}, ConfigError, r"training.epochs is 0: expected a finite number of at least 1"),
        ({"lr": float("nan")}, ConfigError, r"training.lr is nan"),
        ({"optimizer": "adam"}, ConfigError, r"training.optimizer is 'adam': expected one of 'sgd', 'adamw'"),
        ({"epoch": 3}, UnknownNameError, "unknown setting 'epoch': did you mean 'epochs'"),
        ({"network": "dacnn15"}, UnknownNameError, "unknown network 'dacnn15': did you mean .*'dacnn14'"),
        ({"data": "nowhere/at/all"}, DataError, "nowhere/at/all"),
        ({"regulator": "pointwize"}, UnknownNameError, "did you mean 'pointwise'"),
    ],
)
def test_bad_settings_are_one_clear_error_and_leave_no_run(changes: dict, error: type, words: str, tmp_path: Path) -> None:
    settings = {"network": "dacnn3", "data": "digits", **SMALL, **changes}
    with pytest.raises(error, match=words):
        dacnn.train(settings.pop("network"), out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_config_and_settings_beside_it_are_refused() -> None:
    with pytest.raises(ConfigError, match="settings beside it"):
        dacnn.train("dacnn3", config=configure())


def test_without_validation_images_the_last_epoch_is_the_result(tmp_path: Path) -> None:
    result = dacnn.train("dacnn3", data="digits", out=tmp_path / "run", **SMALL, validation=0.0)
    assert result.best.epoch == 2 and result.best.validation_top1 is None
    assert not (tmp_path / "run" / "best.safetensors").exists()
    assert result.weights.name == "last.safetensors"


def test_a_plan_of_ones_own_trains(tmp_path: Path) -> None:
    plan = dacnn.create("dacnn5", width=8, in_channels=1, share="stage").plan
    result = dacnn.train(plan, data="digits", out=tmp_path / "run", **{**SMALL, "width": None, "epochs": 1})
    assert result.network.plan.kernels() == plan.kernels()
    with pytest.raises(ConfigError, match="make the plan for this data set"):
        dacnn.train(dacnn.create("dacnn5", width=8).plan, data="digits", out=tmp_path / "grey", **{**SMALL, "width": None})


def test_streamed_images_train_to_the_same_bits_as_images_in_memory(whole: Path, tmp_path: Path) -> None:
    dacnn.train("dacnn3", data="digits", out=tmp_path / "streamed", **SMALL, memory_gigabytes=0.0)
    assert_same_run(tmp_path / "streamed", whole)


def test_a_run_of_a_plan_resumes_with_its_plan(tmp_path: Path) -> None:
    plan = dacnn.create("dacnn5", width=8, in_channels=1, share="stage").plan
    settings = {**SMALL, "width": None, "checkpoint_minutes": 100.0}
    with pytest.raises(Interrupted):
        dacnn.train(plan, data="digits", out=tmp_path / "run", listener=Interrupting(2, 3, signal.SIGINT), **settings)
    resumed = dacnn.train(out=tmp_path / "run", resume=True)
    assert resumed.network.plan.kernels() == plan.kernels()
    dacnn.train(plan, data="digits", out=tmp_path / "whole", **settings)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


TWO_PROCESSES = """
import sys, dacnn
dacnn.train("dacnn5", data="digits", out=sys.argv[1], width=8, epochs=1, lr=0.01, batch_size=int(sys.argv[2]),
    accumulate=int(sys.argv[3]), precision="float32", threads=1, device="cpu")
"""


def test_two_processes_equal_one_that_accumulates_two_micro_batches(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = subprocess.run(
        [*launch, str(tmp_path / "two"), "64", "1"], capture_output=True, text=True, env=environment, check=False
    )
    assert two.returncode == 0, two.stderr
    one = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "one"), "64", "2"], capture_output=True, text=True, check=False
    )
    assert one.returncode == 0, one.stderr
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    for name in first:
        # the same sums in another order, over 10 steps of float32
        torch.testing.assert_close(
            first[name], second[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    records = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("one", "two")]
    assert records[0]["validation_top1"] == pytest.approx(records[1]["validation_top1"], abs=0.01)
    assert records[0]["train_loss"] == pytest.approx(records[1]["train_loss"], rel=1e-3)


def test_weights_in_a_file_by_themselves_bring_their_plan(whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole / "best.safetensors", tmp_path / "alone.safetensors")
    weights = str(tmp_path / "alone.safetensors")
    result = dacnn.train(weights=weights, data="digits", out=tmp_path / "on", epochs=1, lr=0.0, threads=1, precision="float32")
    assert dacnn.load(result.run).plan == dacnn.load(whole).plan
    with pytest.raises(ConfigError, match="holds another 'dacnn3' than is asked for"):
        dacnn.train(weights=weights, data="digits", out=tmp_path / "other", width=16)


def test_a_validation_loss_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Loop.validate

    def astray(self: Loop, tick: Any) -> Any:
        return dataclasses.replace(measured(self, tick), loss=math.nan)

    monkeypatch.setattr(Loop, "validate", astray)
    with pytest.raises(DivergenceError, match="the validation loss is nan in epoch 1"):
        dacnn.train("dacnn3", data="digits", out=tmp_path / "run", **SMALL)
    assert not list((tmp_path / "run").glob("best*"))


def test_a_run_that_is_not_there_is_begun_with_a_word(tmp_path: Path) -> None:
    said: list[str] = []

    class Hears(Listener):
        def log(self, line: str) -> None:
            said.append(line)

    dacnn.train("dacnn3", data="digits", out=tmp_path / "new", resume=True, listener=Hears(), **(SMALL | {"epochs": 1}))
    assert f"{tmp_path / 'new'} holds no run yet: it is begun" in said


def test_processes_that_are_launched_share_a_training_on_a_cpu(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dacnn"]
    words = ["train", "dacnn3", "--width", "8", "--epochs", "1", "--threads", "1", "--out", str(tmp_path / "two"), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout + done.stderr and done.stdout.count('"epochs"') == 1


def test_a_directory_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="--out is empty"):
        dacnn.train("dacnn3", data="digits", out="", **SMALL)


def test_a_run_whose_images_changed_is_not_resumed(tmp_path: Path) -> None:
    """Other names of classes, other labels, other pixels, fewer images: each is told."""
    folder = tmp_path / "photos"
    for index, name in enumerate(("bright", "dark")):
        (folder / name).mkdir(parents=True)
        for image in range(24):
            pixels = np.random.default_rng(image).integers(0, 128, (16, 16, 3), dtype=np.uint8) + 127 * (1 - index)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{image}.png")
    dacnn.train("dacnn3", data=str(folder), out=tmp_path / "run", **(SMALL | {"batch_size": 8}))
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)

    def refusal() -> str:
        with pytest.raises(CheckpointError) as raised:
            dacnn.train(out=tmp_path / "run", resume=True)
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        return str(raised.value)

    (folder / "bright").rename(folder / "shiny")
    assert "other classes" in refusal()
    (folder / "bright" / "3.png").unlink()
    assert "images" in refusal()
    pixels = np.asarray(Image.open(folder / "dark" / "3.png")) // 2
    for name in range(24):
        Image.fromarray(pixels).save(folder / "dark" / f"{name}.png")
    assert "other input" in refusal()
    # as they were, the run is there again
    dacnn.train(out=tmp_path / "run", resume=True)


def test_a_run_that_is_not_there_is_not_begun_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run to go on with"):
        dacnn.train(out=tmp_path / "rnu", resume=True)
    assert not list(tmp_path.iterdir())
