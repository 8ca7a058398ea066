"""Recipes: what they say, and what they turn into."""

import math

import pytest
import torch

import dacnn
from dacnn.config import TrainingConfig
from dacnn.errors import ConfigError, UnknownNameError
from dacnn.training.recipe import load_recipe, make_optimizer, parameter_groups, recipe_names, schedule, set_learning_rate


def test_the_three_recipes_come_with_the_package() -> None:
    assert recipe_names() == ["digits", "fast", "int8", "paper"]
    assert load_recipe("digits").network.width == 64


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'digits'"):
        load_recipe("digit")


def test_a_recipe_may_be_a_file_and_its_errors_name_it(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[training]\nepochs = 3\n")
    assert load_recipe(str(path)).training.epochs == 3
    path.write_text("[training]\nepoch = 3\n")
    with pytest.raises(ConfigError, match=r"mine\.toml \[training\]: unknown setting 'epoch'"):
        load_recipe(str(path))


@pytest.mark.parametrize("kind", ["cosine", "one-cycle"])
def test_the_learning_rate_rises_linearly_and_falls_to_zero(kind: str) -> None:
    config = TrainingConfig(schedule=kind, warmup=0.2)  # type: ignore[arg-type]
    assert schedule(0.1, config) == pytest.approx(0.5)
    assert schedule(0.2, config) == pytest.approx(1.0)
    assert schedule(0.6, config) == pytest.approx(0.5)
    assert schedule(1.0, config) == pytest.approx(0.0)
    assert schedule(0.4, config) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)) if kind == "cosine" else 0.75)


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert schedule(0.0, TrainingConfig(warmup=0.0)) == 1.0


def test_every_parameter_is_in_one_group_and_vectors_are_not_decayed() -> None:
    network = dacnn.create("dacnn14-reg", width=8)
    groups = parameter_groups(network, TrainingConfig(weight_decay=0.01))
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(map(id, network.parameters()))
    for group in groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1)


def test_only_kernels_with_several_readers_have_the_anchors_rate() -> None:
    network = dacnn.create("dacnn14-mix", width=8)
    config = TrainingConfig(lr=0.1, anchor_lr=0.5)
    rates = {id(parameter): group["peak_lr"] for group in parameter_groups(network, config) for parameter in group["params"]}
    slow = {name for name in network.anchors if rates[id(network.anchors[name])] == pytest.approx(0.05)}
    assert slow == {"width32", "width64"}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimizer_steps_at_the_scheduled_rate(name: str) -> None:
    network = dacnn.create("dacnn3", width=8, seed=0)
    optimizer = make_optimizer(network, TrainingConfig(optimizer=name, lr=0.1))  # type: ignore[arg-type]
    before = network.classifier.weight.clone()
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    assert torch.equal(network.classifier.weight, before)
    set_learning_rate(optimizer, 1.0)
    optimizer.step()
    assert not torch.equal(network.classifier.weight, before)
