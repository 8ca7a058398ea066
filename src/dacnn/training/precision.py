"""What this device is good at: number format, memory format and convolution, chosen by capability and said aloud.

bfloat16 halves the time of a step where a CPU has units for it and makes it ten times slower where it has none, so no
default is right on every machine. Where it has none, and multiplies slowly, Winograd's convolution does a quarter of the work.
"""

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dacnn.config import TrainingConfig
from dacnn.errors import TrainingError

Recomputed = Literal["no", "activations", "segments"]
# words for the log
_CONVOLUTION = {"plain": "", "winograd": ", convolutions by Winograd"}
_MADE_AGAIN = {"no": "", "activations": ", activations made again", "segments": ", activations and segments made again"}


@dataclass(frozen=True)
class Execution:
    """How a training runs; a resumed one runs the same way, or its bits would differ.

    Attributes:
        device: `cpu` or `cuda`.
        precision: Format of the convolutions' operands; weights and sums stay float32.
        memory_format: Order of the activations in memory.
        threads: CPU threads of one process.
        processes: Processes that share the work.
        compiled: Whether the step goes through `torch.compile`.
        recompute: What is made again for the gradient instead of being kept: nothing; what norms, ReLUs and poolings gave;
            or that and whole segments of the network. It changes no bit.
        convolution: Of 3x3 kernels with many channels; the two differ by up to 1e-5 of the largest output.
    """

    device: str
    precision: Literal["float32", "bfloat16"]
    memory_format: Literal["channels_last", "contiguous"]
    threads: int
    processes: int
    compiled: bool
    recompute: Recomputed = "no"
    convolution: Literal["plain", "winograd"] = "plain"

    @property
    def layout(self) -> torch.memory_format:
        """The memory format as PyTorch names it."""
        return torch.channels_last if self.memory_format == "channels_last" else torch.contiguous_format

    def autocast(self) -> torch.autocast:
        """The context in which a forward pass runs."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")

    def describe(self) -> str:
        """One line for the log: what was chosen, on what."""
        hardware = torch.cuda.get_device_name() if self.device == "cuda" else cpu_name()
        return (
            f"{hardware}: {self.precision}, {self.memory_format}, {self.processes} process(es) of {self.threads} thread(s)"
            f"{', compiled' * self.compiled}{_CONVOLUTION[self.convolution]}{_MADE_AGAIN[self.recompute]}"
        )

    def to_table(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def best_device() -> str:
    """The device to run a network on: `cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def cpu_name() -> str:
    """Model name of the CPU, as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def has_bfloat16_units(device: str) -> bool:
    """Whether the device multiplies bfloat16 faster than float32.

    Args:
        device: `cpu` or `cuda`.

    Returns:
        True where it is known to have the units; a CPU of which PyTorch cannot tell has none.
    """
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return _cpu_has("avx512_bf16") or _cpu_has("amx_bf16")


def _cpu_has(unit: str) -> bool:
    """Whether PyTorch knows that the CPU has a unit."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    return bool(tell and tell().get(unit, False))


def choose(config: TrainingConfig, device: str, processes: int = 1, *, foreign: bool = False) -> Execution:
    """Choose how to run on a device.

    Args:
        config: Its `auto` values are chosen here, the others kept.
        device: `cpu` or `cuda`.
        processes: Processes that share the work.
        foreign: Whether the network is a module of somebody else's: what its forward pass does to its activations, such
            as `view()`, may hold for contiguous ones alone.

    Returns:
        The choice.

    Raises:
        TrainingError: bfloat16 was asked for on a GPU that cannot do it, or Winograd's convolution where there is none.
    """
    fast, rounds = has_bfloat16_units(device), config.quantize != "no"
    own_order: Literal["channels_last", "contiguous"] = "contiguous" if foreign else "channels_last"
    if config.precision == "bfloat16" and device == "cuda" and not fast:
        raise TrainingError("training.precision is 'bfloat16': this GPU has no units for it: use 'auto' or 'float32'")
    # who asks for something to be made again has asked not to leave that to a compiler
    # and ranges that are found anew in every epoch would be compiled anew
    automatic = device == "cuda" and config.recompute in ("auto", "no") and not rounds
    compiled = automatic if config.compile == "auto" else config.compile == "yes"
    # a GPU has its own fused kernels for norms
    recompute: Recomputed = "activations" if device == "cpu" and not compiled else "no"
    # eight bits of a bfloat16 are all taken by the numbers themselves: their scale would round them once more
    automatic_precision: Literal["float32", "bfloat16"] = "bfloat16" if fast and not rounds else "float32"
    precision = automatic_precision if config.precision == "auto" else config.precision
    against = {
        f"the precision is {precision}: add --precision float32": precision != "float32",
        "the step is compiled: leave one of them out": compiled,
        "the network is to be rounded, by convolutions of its own: leave one of them out": rounds,
        "the network is a module of somebody else's, with its own convolutions: use 'auto'": foreign,
    }
    if config.convolution == "winograd" and any(against.values()):
        reason = next(reason for reason, holds in against.items() if holds)
        raise TrainingError(f"training.convolution is 'winograd', but {reason}")
    # where it was measured to gain; with AVX-512 it was not measured
    gains = device == "cpu" and _cpu_has("avx2") and not _cpu_has("avx512_f") and not any(against.values())
    automatic_convolution: Literal["plain", "winograd"] = "winograd" if gains else "plain"
    return Execution(
        device=device,
        precision=precision,
        memory_format=own_order if config.memory_format == "auto" else config.memory_format,
        threads=config.threads or torch.get_num_threads(),
        processes=processes,
        compiled=compiled,
        recompute=recompute if config.recompute == "auto" else config.recompute,
        convolution=automatic_convolution if config.convolution == "auto" else config.convolution,
    )
