"""A network of the user's own trains like one of ours: into a run directory, killed anywhere, to the same bits."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dacnn
from dacnn.config import Config, NetworkConfig, TrainingConfig, read_config
from dacnn.errors import CheckpointError, ConfigError, DacnnError, Interrupted, ShapeError
from dacnn.networks.adapted import Adapted
from dacnn.networks.plan import Input
from dacnn.training.listener import Listener
from dacnn.training.recipe import parameter_groups
from dacnn.training.train import TrainResult, configure
from factories import FILE, GROUPS, GivesObject, GivesTuple, Keeps, Stateful, Tied, Views, Wrapped, anchored, chain, frozen
from reference import one_thread  # noqa: F401  (a fixture)

# 5 steps an epoch
SMALL: dict[str, Any] = {"data": "digits", "batch_size": 256, "threads": 1, "precision": "float32", "crop": 0}
ONE = SMALL | {"epochs": 1}
TWO = SMALL | {"epochs": 2, "checkpoint_minutes": 0.0}
CHAIN = f"{FILE}:chain"
RUN_FILES = {"config.toml", "metrics.jsonl", "last.safetensors", "best.safetensors", "resume.safetensors", "tensorboard"}

# trains in a process of its own and kills it, not to be caught, at the start of a step
KILLED = """
import os, signal, sys
import dacnn
from dacnn.training.loop import Loop
original, calls = Loop._train_step, 0
def deadly(*arguments):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
Loop._train_step = deadly
dacnn.train(sys.argv[1], share="all", out=sys.argv[3], data="digits", batch_size=256, threads=1, precision="float32", crop=0,
    epochs=2, checkpoint_minutes=0.0)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run that nobody disturbed."""
    return dacnn.train(CHAIN, share="all", out=tmp_path_factory.mktemp("runs") / "whole", **TWO)


def assert_same_run(run: Path, other: Path) -> None:
    for name in ("last.safetensors", "best.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def seeded(kind: Any = chain) -> nn.Module:
    torch.manual_seed(7)
    return kind()


# ---------------------------------------------------------------- a run


def test_a_run_directory_holds_all_of_the_run(whole: TrainResult) -> None:
    assert {path.name for path in whole.run.iterdir()} == RUN_FILES
    config = read_config(whole.run / "config.toml")
    assert config.network == NetworkConfig(CHAIN, share="all")
    records = [json.loads(line) for line in (whole.run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert records[1]["train_loss"] < records[0]["train_loss"]
    assert list((whole.run / "tensorboard").iterdir())


def test_the_result_is_the_best_network_and_its_kernels_are_stored_once(whole: TrainResult) -> None:
    assert isinstance(whole.network, Adapted) and not whole.network.training
    assert list(whole.network.conversion.groups.values()) == GROUPS["all"]
    assert whole.network.classes == tuple("0123456789") and whole.network.input.channels == 1
    kernels = [name for name, tensor in load_file(whole.weights).items() if tuple(tensor.shape) == (8, 8, 3, 3)]
    assert len(kernels) == 1
    loaded = dacnn.load(whole.run, CHAIN)
    x = torch.randint(0, 256, (5, 32, 32, 1), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded(x), whole.network(x))


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(whole: TrainResult, tmp_path: Path) -> None:
    torch.manual_seed(123)
    dacnn.train(CHAIN, share="all", out=tmp_path / "again", **TWO)
    assert_same_run(tmp_path / "again", whole.run)
    dacnn.train(CHAIN, share="all", out=tmp_path / "other", **TWO, seed=1)
    assert (tmp_path / "other" / "last.safetensors").read_bytes() != (whole.run / "last.safetensors").read_bytes()


@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_killed_run_ends_with_the_same_bits(step: int, whole: TrainResult, tmp_path: Path) -> None:
    """Dropout draws from PyTorch's generator in every step, so that has to be where it was."""
    out = tmp_path / "killed"
    words = [sys.executable, "-c", KILLED, CHAIN, str(step), str(out)]
    killed = subprocess.run(words, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    dacnn.train(out=out, resume=True)
    assert_same_run(out, whole.run)
    assert not list(out.glob(".*")), "nothing half-written is left"


class Interrupting(Listener):
    """Sends this process a signal in a given step."""

    def __init__(self, epoch: int, step: int) -> None:
        self.when = (epoch, step)

    def stepped(self, epoch: int, step: int, steps: int, loss: float, top1: float) -> None:
        if (epoch, step) == self.when:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("when", [(1, 2), (1, 5), (2, 3)])
def test_a_module_from_python_goes_on_with_a_fresh_one(when: tuple[int, int], tmp_path: Path) -> None:
    settings = TWO | {"share": "template", "templates": 2}
    with pytest.raises(Interrupted, match=r"go on with `dacnn.train\(module, out='.*', resume=True\)`"):
        dacnn.train(seeded(), out=tmp_path / "run", listener=Interrupting(*when), **settings)
    with pytest.raises(ConfigError, match=r"'python:Sequential' was given from Python: go on from there"):
        dacnn.train(out=tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="network.name is python:Sequential in this run, got python:Wrapped"):
        dacnn.train(Wrapped(), out=tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="network.templates is 2 in this run, got 3"):
        dacnn.train(chain(), out=tmp_path / "run", resume=True, templates=3)
    dacnn.train(chain(), out=tmp_path / "run", resume=True)
    dacnn.train(seeded(), out=tmp_path / "whole", **settings)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_of_a_factory_says_how_the_command_goes_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="go on with `dacnn train --resume --out"):
        dacnn.train(CHAIN, out=tmp_path / "run", listener=Interrupting(1, 2), **TWO)
    result = dacnn.train(CHAIN, out=tmp_path / "run", resume=True)
    assert len(result.records) == 2


def test_a_resumed_run_refuses_another_network(whole: TrainResult) -> None:
    with pytest.raises(CheckpointError, match="network.share is all in this run, got stage"):
        dacnn.train(CHAIN, share="stage", out=whole.run, resume=True)
    with pytest.raises(CheckpointError, match="network.name is .*chain in this run, got .*Views"):
        dacnn.train(f"{FILE}:Views", out=whole.run, resume=True)
    with pytest.raises(CheckpointError, match="already holds a run"):
        dacnn.train(CHAIN, share="all", out=whole.run, **TWO)


def test_a_file_that_has_changed_since_does_not_go_on(tmp_path: Path) -> None:
    source = "import factories\ndef make(num_classes):\n    return factories.chain(num_classes)\n"
    (tmp_path / "net.py").write_text(source)
    with pytest.raises(Interrupted):
        dacnn.train(f"{tmp_path}/net.py:make", out=tmp_path / "run", listener=Interrupting(1, 2), **TWO)
    (tmp_path / "net.py").write_text(source.replace("factories.chain(num_classes)", "factories.Wrapped(num_classes)"))
    with pytest.raises(CheckpointError, match="does not fit this run's network"):
        dacnn.train(out=tmp_path / "run", resume=True)


def test_a_new_run_directory_is_named_after_file_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # were the path taken over as it is, the run would lie where the file does
    assert dacnn.train(CHAIN, **ONE).run == Path("runs/factories-chain-digits-1")
    assert dacnn.train(chain(), **ONE).run == Path("runs/Sequential-digits-1")
    assert dacnn.train(CHAIN, **ONE).run == Path("runs/factories-chain-digits-2")


# ---------------------------------------------------------------- every way of sharing


@pytest.mark.parametrize("share", GROUPS)
def test_every_way_of_sharing_trains(share: str, tmp_path: Path) -> None:
    module = seeded()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result = dacnn.train(module, share=share, out=tmp_path / "run", **ONE)
    assert list(result.network.conversion.groups.values()) == GROUPS[share]
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items()), "the module was changed"
    tensors = load_file(result.weights)
    assert sum("anchors" in name and "own" not in name for name in tensors) == len(GROUPS[share])
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert result.records[0].train_loss < 2.4


@pytest.mark.parametrize(
    "settings",
    [
        {"groups": ("a.0+e.0", "c.0+d.0")},
        {"share": "stage", "regulator": "low-rank", "regulator_rank": 2},
        {"share": "all", "regulator": "pointwise", "start": "fit"},
        {"share": "all", "start": "mean"},
    ],
    ids=str,
)
def test_groups_regulators_and_starts_train_and_come_back(settings: dict[str, Any], tmp_path: Path) -> None:
    result = dacnn.train(CHAIN, out=tmp_path / "run", **settings, **ONE)
    assert isinstance(result.network, Adapted)
    assert result.network.conversion.regulator == settings.get("regulator")
    assert dacnn.load(tmp_path / "run", CHAIN).conversion == result.network.conversion
    config = read_config(tmp_path / "run" / "config.toml").network
    assert config == NetworkConfig(CHAIN, **settings)


def test_a_start_matters(tmp_path: Path) -> None:
    files = [
        dacnn.train(seeded(), share="all", start=start, out=tmp_path / start, **ONE).weights.read_bytes()
        for start in ("first", "fit", "mean")
    ]
    assert len(set(files)) == 3


@pytest.mark.parametrize("kind", [GivesObject, GivesTuple, Views, Keeps])
@pytest.mark.parametrize("validation", [0.1, 0.0])
def test_whatever_gives_logits_trains(kind: type[nn.Module], validation: float, tmp_path: Path) -> None:
    result = dacnn.train(kind(), share="all", validation=validation, out=tmp_path / "run", **ONE)
    assert result.weights.name == ("best.safetensors" if validation else "last.safetensors")
    assert dacnn.load(tmp_path / "run", kind()).conversion == result.network.conversion
    assert dacnn.count(result.network).stored_parameters < dacnn.count(result.network).used_parameters or kind is Views


def test_bfloat16_and_channels_last_train_where_the_module_allows_it(tmp_path: Path) -> None:
    settings = ONE | {"precision": "bfloat16", "memory_format": "channels_last"}
    assert dacnn.train(chain(), share="all", out=tmp_path / "run", **settings).records[0].train_loss < 2.4


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    result = dacnn.train(Tied(), share="all", out=tmp_path / "run", **ONE)
    assert isinstance(result.network, Adapted)
    assert result.network.module.second.weight is result.network.module.first.weight
    assert "second.weight" not in load_file(result.weights)
    assert list(result.network.conversion.groups.values()) == [("third", "fourth")]


def test_a_module_that_shares_by_itself_trains(tmp_path: Path) -> None:
    result = dacnn.train(anchored(10, 1), out=tmp_path / "run", **ONE)
    assert list(result.network.conversion.groups.values()) == GROUPS["all"]
    with pytest.raises(ConfigError, match="shares by anchors already"):
        dacnn.train(anchored(10, 1), share="all", out=tmp_path / "other", **ONE)
    # what was trained goes on from its weights, in a new run
    again = dacnn.train(result.network, out=tmp_path / "again", **ONE)
    assert again.records[0].train_loss < result.records[0].train_loss
    assert load_file(again.weights).keys() == load_file(result.weights).keys()


def test_what_is_frozen_stays_as_it_is(tmp_path: Path) -> None:
    module = seeded()
    module.stem[0].requires_grad_(False)
    for name in "abcde":
        getattr(module, name)[0].requires_grad_(False)
    result = dacnn.train(module, share="all", out=tmp_path / "run", **ONE)
    tensors = load_file(result.weights)
    assert torch.equal(tensors["stem.0.weight"], module.stem[0].weight)
    assert torch.equal(next(tensor for name, tensor in tensors.items() if ".anchors." in name), module.a[0].weight)
    assert not torch.equal(tensors["head.weight"], module.head.weight)


def test_a_config_goes_with_a_module(tmp_path: Path) -> None:
    training = TrainingConfig(epochs=1, batch_size=256, threads=1, precision="float32", crop=0)
    config = Config(NetworkConfig("dacnn14", share="stage"), training=training)
    result = dacnn.train(seeded(), config=config, out=tmp_path / "run")
    assert list(result.network.conversion.groups.values()) == GROUPS["stage"]
    assert result.config.network == NetworkConfig("python:Sequential", share="stage")
    with pytest.raises(ConfigError, match="settings beside it"):
        dacnn.train(seeded(), config=config, epochs=3)
    config = dataclasses.replace(config, network=NetworkConfig(CHAIN, share="stage"))
    assert dacnn.train(config=config, out=tmp_path / "other").config == config


def test_a_recipe_speaks_of_its_own_network_only(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[network]\nname = "{CHAIN}"\nshare = "stage"\nstart = "fit"\n[training]\nepochs = 3\n')
    assert configure(recipe=str(recipe)).network == NetworkConfig(CHAIN, share="stage", start="fit")
    assert configure(f"{FILE}:Views", recipe=str(recipe)).network == NetworkConfig(f"{FILE}:Views", share="stage", start="fit")
    assert configure("dacnn14", recipe=str(recipe)).network == NetworkConfig("dacnn14")
    assert configure(CHAIN, recipe="digits").network == NetworkConfig(CHAIN)
    assert configure("dacnn14", recipe="digits").network.width == 64


def test_rates_and_decay_go_by_who_reads_a_kernel() -> None:
    shared, _ = dacnn.anchor(chain(), "all", templates=2)
    network = Adapted(shared, Input(32, 32, 1, (0.5,), (0.25,)), tuple("0123456789"))
    config = TrainingConfig(lr=0.4, anchor_lr=0.5, weight_decay=0.01)
    found = {}
    for group in parameter_groups(network, config):
        found |= {id(parameter): (group["peak_lr"], group["weight_decay"]) for parameter in group["params"]}
    assert network.owner is not None
    (bank,) = (network.owner[name] for name in network.owner)
    # slower, and decayed as if it were not
    assert found[id(bank)] == (0.2, 0.02)
    assert all(found[id(own)] == (0.4, 0.0) for own in network.owner.own.parameters())
    assert found[id(shared.stem[0].weight)] == (0.4, 0.01)
    assert found[id(shared.stem[1].weight)] == found[id(shared.head.bias)] == (0.4, 0.0)
    assert len(found) == len(list(network.parameters()))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("network", "settings", "error", "words"),
    [
        (f"{FILE}:seven_classes", {}, ShapeError, r"gives \(2, 7\) for 2 images: expected logits of shape \(2, 10\)"),
        (f"{FILE}:three_channels", {}, ShapeError, "does not run on images of N x 1 x 32 x 32"),
        (f"{FILE}:GivesDict", {}, ShapeError, "GivesDict gives dict"),
        (f"{FILE}:without_parameters", {}, ConfigError, "Flatten has no parameters"),
        (f"{FILE}:absent", {}, ConfigError, "has no function 'absent'"),
        (f"{FILE}", {}, ConfigError, "names no function in the file"),
        (frozen(), {}, ConfigError, "nothing in the network learns: expected parameters whose requires_grad is True"),
        (Stateful(), {}, CheckpointError, "'module._extra_state' of the state is a dict"),
        (chain(), {"width": 8}, ConfigError, "network.width is 8: it changes networks of the zoo"),
        (chain(), {"share": "repeat"}, ConfigError, "only networks of the zoo can tile a kernel"),
        (chain(), {"regulator": "shift"}, ConfigError, "but nothing is shared"),
        (CHAIN, {"templates": 3}, ConfigError, "expected 'template'"),
        (chain(), {"groups": ("a.0+absent",)}, DacnnError, "'absent', which is no layer"),
        ("python:Sequential", {}, ConfigError, "was given from Python"),
        (chain, {}, ConfigError, "train got a function: expected the name of a network, a plan or a module"),
        (dacnn.create("dacnn3", width=4), {}, ConfigError, r"trained anew from its plan: dacnn.train\(network.plan\)"),
        ("dacnn3", {"start": "fit"}, ConfigError, "network.start is 'fit': kernels of the zoo are drawn"),
        ("dacnn3", {"templates": 2}, ConfigError, "network.templates is 2, but network.share is 'all'"),
        ("dacnn3", {"base_width": 2}, ConfigError, "network.base_width is 2, but network.share is 'all'"),
    ],
)
def test_what_cannot_train_is_one_clear_error_and_leaves_no_run(
    network: Any, settings: dict[str, Any], error: type[DacnnError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words) as caught:
        dacnn.train(network, out=tmp_path / "run", **ONE, **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
