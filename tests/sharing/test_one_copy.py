"""Whatever is done to a converted module, it keeps one copy of each kernel, which all its readers read."""

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dacnn
from dacnn.sharing.anchors import Anchors
from dacnn.sharing.readers import owner_of
from foreign import chain, make, stirred, tensors_of

# float32 sums in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def pickled(module: nn.Module, folder: Path) -> nn.Module:
    # of one's own making: nothing from outside is unpickled
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assigned(module: nn.Module, folder: Path) -> nn.Module:
    with torch.device("meta"):
        other = copy.deepcopy(module).to("meta")
    # clones: assigning a state dict shares memory with where it came from, which is not what is asked here
    other.load_state_dict({name: tensor.clone() for name, tensor in module.state_dict().items()}, assign=True)
    return other


def emptied(module: nn.Module, folder: Path) -> nn.Module:
    other = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    for tensor in (*other.parameters(), *other.buffers()):
        # stands for whatever the memory held before
        tensor.data.fill_(9)
    other.load_state_dict(module.state_dict())
    return other


def through_safetensors(module: nn.Module, folder: Path) -> nn.Module:
    safetensors.torch.save_file(module.state_dict(), folder / "module.safetensors")
    other = stirred(copy.deepcopy(module), seed=7)
    other.load_state_dict(safetensors.torch.load_file(folder / "module.safetensors"))
    return other


OPERATIONS: dict[str, Callable[[Any, Path], nn.Module]] = {
    "deepcopy": lambda module, folder: copy.deepcopy(module),
    "double and back": lambda module, folder: copy.deepcopy(module).double().float(),
    "channels last": lambda module, folder: copy.deepcopy(module).to(memory_format=torch.channels_last),
    "pickle": pickled,
    "load_state_dict assign": assigned,
    "to_empty": emptied,
    "safetensors": through_safetensors,
    "in another module": lambda module, folder: nn.Sequential(copy.deepcopy(module)).double().float()[0],
}


@pytest.mark.parametrize("settings", [{}, {"regulator": "pointwise"}, {"templates": 2}], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_copy_of_each_kernel_is_kept_and_read_by_all(operation: str, settings: dict, tmp_path: Path) -> None:
    for name in ("unet", "convmixer"):
        module, x = make(name)
        original, mapping = dacnn.anchor(module, **settings)
        made = OPERATIONS[operation](original, tmp_path)
        torch.testing.assert_close(made(x), original(x), **CLOSE)
        assert list(made.state_dict()) == list(original.state_dict())
        storages = [tensor.untyped_storage().data_ptr() for tensor in made.state_dict().values()]
        assert len(set(storages)) == len(storages)
        mine = {tensor.untyped_storage().data_ptr() for tensor in original.state_dict().values()}
        assert not mine & set(storages)
        assert len([part for part in made.modules() if isinstance(part, Anchors)]) == 1
        owner = owner_of(made)
        assert owner is not None and list(owner) == list(mapping.groups)
        assert all(tensor.is_contiguous() for tensor in owner.parameters())
        for kernel, readers in mapping.groups.items():
            with torch.no_grad():
                owner[kernel].zero_()
            assert all((made.get_submodule(reader).weight == 0).all() for reader in readers)


@pytest.mark.parametrize("settings", [{}, {"regulator": "pointwise"}, {"templates": 2}], ids=str)
def test_a_functional_call_reads_the_tensors_that_it_is_given(settings: dict) -> None:
    module, x = make("convmixer")
    shared, _ = dacnn.anchor(module, **settings)
    other = {name: value.detach() * 0.5 for name, value in shared.named_parameters()}
    changed = copy.deepcopy(shared)
    changed.load_state_dict(other, strict=False)
    torch.testing.assert_close(torch.func.functional_call(shared, other, x), changed(x), rtol=0, atol=0)
    found = torch.func.grad(lambda values: torch.func.functional_call(shared, values, x).square().mean())(other)
    assert_equal_gradients(found, gradients(changed, x))


# ---------------------------------------------------------------- compile, export, checkpoint, several processes


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that every output counts in."""
    module.zero_grad()
    tensors_of(module(x))[0].square().mean().backward()
    return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual and set(actual) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("name", "backend"), [("resnet", "eager"), ("convmixer", "aot_eager"), ("mlp-mixer", "aot_eager"), ("attention", "eager")]
)
def test_compiled_the_network_and_its_gradients_are_the_same(name: str, backend: str) -> None:
    torch.compiler.reset()
    module, x = make(name)
    shared, mapping = dacnn.anchor(module, templates=2 if name == "mlp-mixer" else None)
    shared.train()
    twin = copy.deepcopy(shared)
    compiled = torch.compile(shared, backend=backend, fullgraph=True)
    gradients(compiled, x)
    expected = gradients(twin, x)
    assert_equal_gradients({key: value.grad for key, value in shared.named_parameters() if value.grad is not None}, expected)
    # it reads the kernel that there is, not one of when it was compiled
    with torch.no_grad():
        for network in (shared, twin):
            owner = owner_of(network)
            assert owner is not None
            owner[next(iter(mapping.groups))].zero_()
        torch.testing.assert_close(tensors_of(compiled(x)), tensors_of(twin(x)), **CLOSE)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "strict"), [("resnet", False), ("unet", True), ("convmixer", True), ("mlp-mixer", False), ("attention", False)]
)
def test_exported_the_network_holds_each_kernel_once(name: str, strict: bool) -> None:
    module, x = make(name)
    shared, mapping = dacnn.anchor(module, regulator=None if name == "attention" else "pointwise")
    exported = torch.export.export(shared, (x,), strict=strict)
    assert set(exported.state_dict) == set(shared.state_dict())
    parameters = {spec.target for spec in exported.graph_signature.input_specs if spec.kind.name == "PARAMETER"}
    assert parameters == {key for key, _ in shared.named_parameters()}
    owner = owner_of(shared)
    assert owner is not None
    tensors = [value for value in (*exported.state_dict.values(), *exported.constants.values()) if isinstance(value, Tensor)]
    for kernel in mapping.groups:
        assert len([value for value in tensors if torch.equal(value, owner[kernel])]) == 1
    torch.testing.assert_close(tensors_of(exported.module()(x))[0], tensors_of(shared(x))[0], **CLOSE)


class Checkpointed(nn.Sequential):
    """Makes what its parts gave again for the gradient."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("templates", [None, 2])
def test_activation_checkpoints_around_blocks_give_the_same_gradients(reentrant: bool, templates: int | None) -> None:
    shared, _ = dacnn.anchor(stirred(chain(depth=4)), regulator="pointwise", templates=templates)
    twin = copy.deepcopy(shared)
    shared.__class__ = Checkpointed
    shared.reentrant = reentrant
    x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert_equal_gradients(gradients(shared, x), gradients(twin, x))


TWO_PROCESSES = """
import os

import torch
from torch.nn.parallel import DistributedDataParallel
import dacnn
from dacnn.errors import PlanError
from foreign import UNet, conv_mixer, stirred

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
for build, settings in ((UNet, {}), (conv_mixer, {"templates": 2, "regulator": "pointwise"})):
    # different numbers: those of the first process are sent to the other
    alone, _ = dacnn.anchor(stirred(build(), seed=rank).eval(), **settings)
    model = DistributedDataParallel(alone)
    model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    parallel = [parameter.grad.clone() for parameter in alone.parameters()]
    alone.zero_grad()
    alone(x).square().mean().backward()
    for parameter, gradient in zip(alone.parameters(), parallel, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)
    try:
        dacnn.anchor(DistributedDataParallel(build()))
    except PlanError as error:
        assert "the module is wrapped in DistributedDataParallel: share the kernels of the module inside" in str(error)
    else:
        raise AssertionError
# what is left to do at the end of a process, and in which order, is no claim of this test
torch.distributed.barrier()
os._exit(0)
"""


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    places = [str(Path(dacnn.__file__).parent.parent), str(Path(__file__).parent.parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_an_optimiser_sees_each_kernel_once_and_a_step_moves_all_readers() -> None:
    module, x = make("convmixer")
    shared, mapping = dacnn.anchor(module)
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.1)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shared_away = sum(
        (len(readers) - 1) * shared.get_submodule(readers[0]).weight.numel() for readers in mapping.groups.values()
    )
    assert len(held) == len({id(parameter) for parameter in held})
    assert sum(parameter.numel() for parameter in held) == sum(p.numel() for p in module.parameters()) - shared_away
    before = copy.deepcopy(shared)
    kernel_gradients = gradients(shared, x)
    optimizer.step()
    for readers in mapping.groups.values():
        for reader in readers:
            owner = next(key for key in kernel_gradients if shared.get_parameter(key) is shared.get_submodule(reader).weight)
            expected = before.get_submodule(reader).weight - 0.1 * kernel_gradients[owner]
            torch.testing.assert_close(shared.get_submodule(reader).weight, expected)
