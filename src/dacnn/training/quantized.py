"""A network as its integers will compute it, in floats that learn: quantisation-aware training.

The steps are those of the network's Program, and what is rounded is what the integer program stores: each kernel once, where it
is owned, and every value. Rounding lets the gradient of kernels through, and that of values within their range. Batch norms
are the scales and shifts that they are at inference: their gain and bias learn, their statistics stay.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dacnn.deploy.fusion import Stored, summed
from dacnn.deploy.integers.calibrate import calibrate
from dacnn.deploy.integers.floats import named, run
from dacnn.deploy.lower import lower
from dacnn.deploy.program import CombinedKernel, Convolve, KernelStep, Program, RepeatedKernel, ScaleShift
from dacnn.errors import TrainingError
from dacnn.networks.classifier import Classifier
from dacnn.quantization import has_own, kernel_scales, quantity, rounded, rounded_kernel, without_own

# N images, C channels, H rows, W columns, K classes

# of what a norm's numbers and those of the Program may differ by rounding
_RELATIVE_ERROR = 1e-5


class Quantized(nn.Module):
    """A network whose kernels and values are rounded.

    Attributes:
        network: The network, whose parameters learn, and which remembers the ranges of its values.
    """

    def __init__(self, network: Classifier) -> None:
        """Find out where the network rounds.

        Args:
            network: A trained one: a random one has no ranges worth keeping.

        Raises:
            DeployError: The network cannot be expressed in steps.
            TrainingError: None of its parameters is known to its steps.
        """
        super().__init__()
        self.network = network
        program = lower(network)
        self._steps, self._result, self._input = summed(program), program.result, program.input
        self._ranged = {step.out for step in self._steps if isinstance(step, Stored) or hasattr(step, "kind")}
        self._ranged.discard(self._result)
        self._constants = {name: torch.from_numpy(tensor) for name, tensor in program.tensors.items()}
        self._live = self._find_live(program)
        self._rounding = _roundings(program)
        if not self._live:
            raise TrainingError(
                f"'{program.name}' computes all its kernels from others and cannot be trained in int8: leave out --quantize"
            )

    def _find_live(self, program: Program) -> dict[str, Callable[[], Tensor]]:
        """What makes each tensor of the program out of the network's parameters, as they are now."""
        parameters = dict(self.network.named_parameters())
        live: dict[str, Callable[[], Tensor]] = {}
        for name, tensor in self._constants.items():
            if name in parameters and parameters[name].numel() == tensor.numel():
                live[name] = lambda name=name, shape=tensor.shape: dict(self.network.named_parameters())[name].view(shape)  # type: ignore[misc]
        affine = {step for step in program.operations() if isinstance(step, ScaleShift) and step.scale and step.shift}
        for step in affine:
            scale, shift = named(step.scale or ""), named(step.shift or "")
            norm = _norm_of(self.network, scale)
            # a norm that is merged with something else stays as it is
            if norm is not None and all(map(_alike, _scale_and_shift(norm), (self._constants[scale], self._constants[shift]))):
                live[scale] = lambda norm=norm: _scale_and_shift(norm)[0]  # type: ignore[misc]
                live[shift] = lambda norm=norm: _scale_and_shift(norm)[1]  # type: ignore[misc]
        return live

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """Find the ranges of the values, of the network as it is now.

        Args:
            images: uint8, shape (N, H, W, C).
        """
        self.network.ranges = calibrate(lower(self.network), images.cpu())

    def forward(self, x: Tensor) -> Tensor:
        """Classify images as the integers would.

        Args:
            x: Normalised floats, shape (N, C, H, W).

        Returns:
            Logits, shape (N, K).
        """
        assert self.network.ranges is not None, "not calibrated"
        quantities = {name: quantity(*self.network.ranges[name]) for name in self._ranged}
        tensors = {name: tensor.to(x.device) for name, tensor in self._constants.items() if name not in self._live}
        tensors |= {name: make() for name, make in self._live.items()}
        # each kernel once, however many layers read it
        tensors |= {name: rounding(tensors[name]) for name, rounding in self._rounding.items()}
        see = lambda name, value: rounded(value, quantities[name]) if name in quantities else value  # noqa: E731
        return run(self._steps, self._result, x, self._input, tensors, see)


def _norm_of(network: nn.Module, scale: str) -> _BatchNorm | None:
    try:
        module = network.get_submodule(scale.removesuffix(".scale"))
    except AttributeError:
        return None
    return module if isinstance(module, _BatchNorm) and module.running_mean is not None and module.affine else None


def _scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """What a norm multiplies by and adds at inference."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _alike(made: Tensor, tensor: Tensor) -> bool:
    difference = (made.detach().cpu() - tensor).abs().max()
    return bool(difference <= _RELATIVE_ERROR * tensor.abs().max().clamp_min(1e-30))


def _roundings(program: Program) -> dict[str, Callable[[Tensor], Tensor]]:
    """How each stored kernel is rounded, by its name."""
    steps = [step for step in program.operations() if isinstance(step, KernelStep)]
    bases = {named(step.kernel.tensor) for step in steps if isinstance(step.kernel, RepeatedKernel)}
    roundings: dict[str, Callable[[Tensor], Tensor]] = {}
    for step in steps:
        name = named(step.kernel.tensor)
        is_bank = isinstance(step.kernel, CombinedKernel)
        shape, groups = program.tensors[name].shape[is_bank:], step.groups if isinstance(step, Convolve) else 1
        if name in bases:
            roundings[name] = partial(rounded_kernel, per_channel=False)
        else:
            roundings[name] = partial(_rounded_bank if is_bank else rounded_kernel, own=has_own(shape, groups))
    return roundings


def _rounded_bank(bank: Tensor, own: bool) -> Tensor:
    """Templates of shape (T, O, I, ...) in one scale for each output channel."""
    scales = kernel_scales((without_own(bank) if own else bank).transpose(0, 1)).view(-1, *[1] * (bank.ndim - 2))
    return bank + (torch.round(bank / scales) * scales - bank).detach()
