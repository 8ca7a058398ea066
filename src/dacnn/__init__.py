"""Anchored convolutional networks: many layers, one kernel, stored once."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dacnn.checkpoint import load, save
    from dacnn.config import Config, DataConfig, NetworkConfig, TrainingConfig, read_config
    from dacnn.errors import DacnnError
    from dacnn.measure.count import count
    from dacnn.networks.network import Network, create
    from dacnn.networks.plan import Block, Input, Layer, Plan, Regulator, Stage
    from dacnn.prediction import predict
    from dacnn.sharing.anchors import Combine, Repeat
    from dacnn.sharing.conversion import Conversion
    from dacnn.sharing.convert import anchor
    from dacnn.training.evaluate import evaluate
    from dacnn.training.train import train

# where each public name lives: loaded when it is first used, so that `dacnn --help` need not wait for torch
_HOMES = {
    "Block": "networks.plan",
    "Combine": "sharing.anchors",
    "Config": "config",
    "Conversion": "sharing.conversion",
    "DacnnError": "errors",
    "DataConfig": "config",
    "Input": "networks.plan",
    "Layer": "networks.plan",
    "Network": "networks.network",
    "NetworkConfig": "config",
    "Plan": "networks.plan",
    "Regulator": "networks.plan",
    "Repeat": "sharing.anchors",
    "Stage": "networks.plan",
    "TrainingConfig": "config",
    "anchor": "sharing.convert",
    "count": "measure.count",
    "create": "networks.network",
    "evaluate": "training.evaluate",
    "load": "checkpoint",
    "predict": "prediction",
    "read_config": "config",
    "save": "checkpoint",
    "train": "training.train",
}

__all__ = [
    "Block",
    "Combine",
    "Config",
    "Conversion",
    "DacnnError",
    "DataConfig",
    "Input",
    "Layer",
    "Network",
    "NetworkConfig",
    "Plan",
    "Regulator",
    "Repeat",
    "Stage",
    "TrainingConfig",
    "anchor",
    "count",
    "create",
    "evaluate",
    "load",
    "predict",
    "read_config",
    "save",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dacnn' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dacnn.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
