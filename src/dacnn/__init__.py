"""Anchored convolutional networks: many layers, one kernel, stored once."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dacnn import runtime
    from dacnn.checkpoint import load, save
    from dacnn.config import Config, DataConfig, NetworkConfig, TrainingConfig, read_config
    from dacnn.deploy.export import export
    from dacnn.deploy.packed import pack
    from dacnn.errors import DacnnError
    from dacnn.measure.audit import audit
    from dacnn.measure.count import count
    from dacnn.measure.memory import measure_training_memory, predict_training_memory
    from dacnn.networks.adapted import adapt
    from dacnn.networks.fold import alike, fold
    from dacnn.networks.network import Network, create
    from dacnn.networks.plan import Block, Input, Layer, Plan, Regulator, Stage
    from dacnn.networks.rival import rival
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
    "adapt": "networks.adapted",
    "alike": "networks.fold",
    "anchor": "sharing.convert",
    "audit": "measure.audit",
    "count": "measure.count",
    "create": "networks.network",
    "evaluate": "training.evaluate",
    "export": "deploy.export",
    "fold": "networks.fold",
    "load": "checkpoint",
    "measure_training_memory": "measure.memory",
    "pack": "deploy.packed",
    "predict": "prediction",
    "predict_training_memory": "measure.memory",
    "read_config": "config",
    "rival": "networks.rival",
    "runtime": "runtime",
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
    "adapt",
    "alike",
    "anchor",
    "audit",
    "count",
    "create",
    "evaluate",
    "export",
    "fold",
    "load",
    "measure_training_memory",
    "pack",
    "predict",
    "predict_training_memory",
    "read_config",
    "rival",
    "runtime",
    "save",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dacnn' has no attribute '{name}'")
    home = importlib.import_module(f"dacnn.{_HOMES[name]}")
    # a public module is its own home
    return home if _HOMES[name] == name else getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
