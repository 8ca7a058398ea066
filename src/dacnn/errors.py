"""Every error that the library raises on purpose.

    DacnnError                  something a user can mend; the command line prints it as one line
    ├── ConfigError             a value in a TOML file, a recipe or an argument
    ├── UnknownNameError        a name that a registry does not hold
    ├── PlanError               a network that cannot exist: shapes that do not meet, kernels nobody owns
    ├── ShapeError              a tensor or an image of the wrong shape or type
    ├── DataError               a data set or an image file
    ├── CheckpointError         a file of weights or a run directory
    ├── ArtefactError           an exported or saved model that cannot be examined
    ├── DeployError             a network that cannot be put into a form that runs elsewhere
    └── TrainingError           a training that cannot go on
        ├── DivergenceError     the loss is no number any more
        └── Interrupted         somebody asked it to stop, and its state is saved

A message says where, what it got, what it expected and what to do about it.
"""

import difflib
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path


class DacnnError(Exception):
    """Root of the tree: catch it to catch whatever the library refuses."""


class ConfigError(DacnnError, ValueError):
    """A configured value is missing, unknown or out of range."""


class UnknownNameError(DacnnError, LookupError):
    """A registry does not hold the name that was asked for."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Name what was asked for and what comes nearest.

        Args:
            kind: What the registry holds, in the singular: `network`, `recipe`.
            name: The name that is not there.
            known: The names that are.
        """
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3)
        remedy = (
            f"did you mean {' or '.join(repr(match) for match in near)}?" if near else f"expected one of {', '.join(names)}"
        )
        super().__init__(f"unknown {kind} '{name}': {remedy}")


class PlanError(DacnnError, ValueError):
    """A plan contradicts itself."""


class ShapeError(DacnnError, ValueError):
    """A tensor or an image has the wrong shape or type."""


class DataError(DacnnError, ValueError):
    """A data set or an image cannot be read as what it is said to be."""


class CheckpointError(DacnnError, ValueError):
    """A file of weights or a run directory cannot be read, written or resumed."""


class ArtefactError(DacnnError, ValueError):
    """An exported or saved model cannot be read, or not be measured, as what it is said to be."""


class DeployError(DacnnError, ValueError):
    """A network cannot be put into a form that runs elsewhere, or what came out is wrong."""


class TrainingError(DacnnError, RuntimeError):
    """A training cannot start or go on."""


class DivergenceError(TrainingError):
    """The loss is no number any more."""


class Interrupted(TrainingError):
    """Somebody asked the training to stop; its state is saved."""


def told(error: BaseException) -> str:
    """What code of the user's raised, in one line, and where in that code.

    Args:
        error: What was caught.

    Returns:
        Its type, the first line that it says, and the innermost file and line that is neither ours nor installed.
    """
    lines = str(error).splitlines()
    said = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    installed = (sys.prefix, sys.base_prefix, str(Path(__file__).parent), "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(installed)]
    return f"{said} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else said
