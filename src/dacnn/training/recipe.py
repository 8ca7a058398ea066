"""Recipes by name, and what they turn into: parameter groups, an optimiser, a learning rate for every step."""

import math
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dacnn.config import Config, TrainingConfig, read_config
from dacnn.errors import ConfigError, UnknownNameError
from dacnn.networks.classifier import Classifier


def recipe_names() -> list[str]:
    """Names of the recipes that come with the library."""
    return sorted(
        file.name.removesuffix(".toml") for file in resources.files("dacnn.recipes").iterdir() if file.name.endswith(".toml")
    )


def load_recipe(name: str) -> Config:
    """Read a recipe.

    Args:
        name: A name from `recipe_names()`, or the path of a TOML file.

    Returns:
        The config that the recipe sets a part of; the rest has its defaults.

    Raises:
        UnknownNameError: There is no such recipe and no such file.
        ConfigError: The file is no recipe.
    """
    if name in recipe_names():
        with resources.as_file(resources.files("dacnn.recipes") / f"{name}.toml") as path:
            return read_config(path)
    if Path(name).is_file():
        return read_config(Path(name))
    if name.endswith(".toml"):
        raise ConfigError(f"recipe '{name}': no such file: expected a TOML file, or one of {', '.join(recipe_names())}")
    raise UnknownNameError("recipe", name, recipe_names())


def parameter_groups(network: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Sort the parameters by how they are trained.

    Args:
        network: The network.
        config: Learning rate, decay, and the factor on kernels with several readers.

    Returns:
        Groups as an optimiser takes them; `peak_lr` is the learning rate at the top of the schedule.
    """
    shared: set[int] = set()
    own: set[int] = set()
    anchors = network.owner if isinstance(network, Classifier) else None
    if anchors is not None:
        own = set(map(id, anchors.own.parameters()))
        shared = {id(anchors[name]) for name, readers in anchors.readers().items() if len(readers) > 1}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        if not parameter.requires_grad:
            continue
        factor = config.anchor_lr if id(parameter) in shared else 1.0
        lr = config.lr * factor
        # norms and biases are vectors: decaying them changes what the network can say, not how large it is;
        # a step decays by rate times decay, and a slower kernel shall not decay more slowly; coefficients and gains are not
        # decayed either (Savarese & Maire, arXiv:1902.09701)
        decay = config.weight_decay / factor if parameter.ndim > 1 and id(parameter) not in own else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    return [{"params": members, "peak_lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()]


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser that a recipe names.

    Args:
        network: Whose parameters it steps.
        config: The recipe.

    Returns:
        The optimiser, its learning rates at their peak.

    Raises:
        ConfigError: Nothing learns.
    """
    groups = parameter_groups(network, config)
    if not groups:
        raise ConfigError("nothing in the network learns: expected parameters whose requires_grad is True")
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.99))


def schedule(progress: float, config: TrainingConfig) -> float:
    """The factor on the learning rate at a point of the training.

    Args:
        progress: Share of the steps that are done, 0 to 1.
        config: `schedule` and `warmup`.

    Returns:
        0 to 1: linear up to 1 over the warm-up, then down to 0, along a cosine or a line.
    """
    if progress < config.warmup:
        return progress / config.warmup
    rest = (progress - config.warmup) / (1 - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * rest)) if config.schedule == "cosine" else 1 - rest


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Bring every group to `factor` times its peak.

    Args:
        optimizer: One that `make_optimizer` made.
        factor: 0 to 1.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
