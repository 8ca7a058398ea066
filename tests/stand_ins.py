"""Contenders of the bench that need no runtime: each misbehaves in its own way. Loaded by name in processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dacnn.bench.contenders import Artefact, Contender, Loaded

CLASSES = 10
LOG = "DACNN_TEST_LOG"


def write(network: Any, folder: Path, largest_batch: int) -> None:
    (folder / "a").write_bytes(b"12345")
    (folder / "b").write_bytes(b"123")


def write_fails(network: Any, folder: Path, largest_batch: int) -> None:
    raise ValueError("no such\noperator")


def _zeros(images: Any) -> Any:
    return np.zeros((len(images), CLASSES))


def load_notes(artefact: Artefact) -> Loaded:
    """Notes every run: the process and the batch."""

    def run(images: Any) -> Any:
        with open(os.environ[LOG], "a", encoding="utf-8") as log:
            log.write(f"{os.getpid()} {len(images)} {images.dtype} {images.shape[1:]}\n")
        return _zeros(images)

    return Loaded(run)


def load_holds(artefact: Artefact) -> Loaded:
    """Takes 64 MiB for every artefact but the tiny one."""
    held = np.ones((1 if artefact.folder.suffix == ".tiny" else 64) * 2**17)
    return Loaded(lambda images: _zeros(images) + held[0])


def load_dies(artefact: Artefact) -> Loaded:
    """Ends its process at the twentieth run, which is in a round."""
    runs = []

    def run(images: Any) -> Any:
        runs.append(0)
        if len(runs) > 20 and artefact.folder.suffix != ".tiny":
            print("the last words", flush=True)
            os._exit(7)
        time.sleep(0.05)
        return _zeros(images)

    return Loaded(run)


def load_wrong_shape(artefact: Artefact) -> Loaded:
    return Loaded(lambda images: np.zeros((len(images), CLASSES + 1)))


def load_sleeps(artefact: Artefact) -> Loaded:
    """Starts a process and waits for ever."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (artefact.folder / "pid").write_text(str(child.pid))
    time.sleep(600)
    raise AssertionError


def stand_in(name: str, load: str, *, writer: str = "write", **settings: Any) -> Contender:
    return Contender(name, "a stand-in", f"stand_ins:{writer}", f"stand_ins:{load}", **settings)
