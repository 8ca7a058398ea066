"""The command line: it composes what stands above it and has no logic of its own."""

import os
import sys
from typing import Any

import tyro

from dacnn import __version__
from dacnn.commands.artefacts import audit, export
from dacnn.commands.benches import bench
from dacnn.commands.networks import count, models, plan, show
from dacnn.commands.runs import eval, fold, predict, train
from dacnn.errors import DacnnError, Interrupted
from dacnn.flags import FLAG_RULES

_COMMANDS: dict[str, Any] = {
    "train": train,
    "eval": eval,
    "predict": predict,
    "models": models,
    "show": show,
    "plan": plan,
    "fold": fold,
    "count": count,
    "export": export,
    "audit": audit,
    "bench": bench,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a refusal is one line on standard error and exit status 2.

    Args:
        arguments: The words behind `dacnn`; None: those of this process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words == ["--version"]:
        print(f"dacnn {__version__}")
        return
    try:
        tyro.extras.subcommand_cli_from_dict(
            _COMMANDS,
            prog="dacnn",
            description="Anchored convolutional networks: many layers read one kernel, and it is stored once.",
            args=words,
            config=(tyro.conf.FlagCreatePairsOff,),
            registry=FLAG_RULES,
        )
    except Interrupted as stop:
        print(f"dacnn: {stop}", file=sys.stderr)
        sys.exit(130)
    except DacnnError as error:
        print("dacnn: error:", *str(error).splitlines(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dacnn: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output (`| head`) has gone; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
