"""Every known hazard, made with the tool that makes it; every format; the unshared twin, which has no copies."""

import copy
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import dacnn
from dacnn.cli import main
from dacnn.measure.audit import Audit, Kernel, audit
from dacnn.measure.hazards import HAZARDS
from dacnn.networks.network import Network, create
from reference import one_thread, randomise  # noqa: F401  (one_thread is a fixture)

# the tools warn of themselves, each with its own words
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)

# layers of dacnn14 that read its shared kernel
READERS = 12


class Shared(nn.Module):
    """Layers that call one convolution module: what most people write when they share a kernel."""

    def __init__(self, layers: int = 4, channels: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.shared = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels) for _ in range(layers)])
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.uniform_(module.running_var, 0.5, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        for norm in self.norms:
            x = norm(self.shared(x)).relu()
        return x


class Tied(nn.Module):
    """Layers whose convolutions are modules of their own and hold one Parameter."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(layers)])
        for layer in self.layers[1:]:
            layer.weight = self.layers[0].weight


def network(width: int = 8, name: str = "dacnn14", **changes: Any) -> Network:
    return randomise(create(name, width=width, num_classes=5, seed=0, **changes)).eval()


def exported(module: nn.Module, path: Path, dynamo: bool = True) -> Path:
    images = torch.zeros(1, 3, 32, 32)
    if dynamo:
        torch.onnx.export(module, (images,), path, dynamo=True, external_data=False, verbose=False)
    else:
        torch.onnx.export(module, (images,), path, dynamo=False)
    return path


def optimised(path: Path, level: str = "ALL") -> Path:
    """What ONNX Runtime writes from an ONNX file when it is asked to keep what it optimised."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(path.with_suffix(f".{level}.onnx"))
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Path(options.optimized_model_filepath)


def fuse(module: nn.Module) -> nn.Module:
    # PyTorch's file warns when it is imported
    from torch.fx.experimental import optimization

    return optimization.fuse(module)


def counts(found: Audit) -> list[int]:
    return sorted(len(kernel.copies) for kernel in found.kernels)


def largest(found: Audit) -> Kernel:
    return max(found.kernels, key=lambda kernel: len(kernel.copies))


# ---------------------------------------------------------------- hazards, each with its tool


@pytest.mark.parametrize("width", [8, 16])
def test_the_legacy_onnx_export_writes_a_scaled_copy_for_each_layer(width: int, tmp_path: Path) -> None:
    found = audit(exported(network(width), tmp_path / "legacy.onnx", dynamo=False))
    kernel = largest(found)
    assert len(kernel.copies) == READERS and not found.single
    assert found.wasted_bytes == (READERS - 1) * 4 * width * width * 9
    assert kernel.hazard == "legacy-onnx-export" and [hazard.name for hazard in found.hazards] == [kernel.hazard]
    assert {one.difference for one in kernel.copies[1:]} == {("scaled per output channel",)}
    initialisers = {tensor.name for tensor in onnx.load(tmp_path / "legacy.onnx").graph.initializer}
    assert {name for one in kernel.copies for name in one.names} <= initialisers


def test_the_current_onnx_export_writes_each_kernel_once(tmp_path: Path) -> None:
    found = audit(exported(network(), tmp_path / "model.onnx"), against=network())
    assert found.single and found.wasted_bytes == 0 and found.hazards == ()
    assert [one.readers for kernel in found.kernels for one in kernel.copies if kernel.name == "anchors.width8"] == [READERS]


@pytest.mark.parametrize("width", [8, 16, 24])
@pytest.mark.parametrize("level", ["BASIC", "EXTENDED", "ALL"])
def test_onnx_runtime_writes_scaled_copies_and_blocks_them(width: int, level: str, tmp_path: Path) -> None:
    path = optimised(exported(network(width), tmp_path / "model.onnx"), level)
    blocking = any(node.domain == "com.microsoft.nchwc" for node in onnx.load(path).graph.node)
    # every x86 processor of today has the units for it; elsewhere the optimiser may leave the order as it is
    assert blocking == (level == "ALL") or platform.machine() not in {"x86_64", "AMD64"}
    for against in (None, network(width)):
        found = audit(path, against=against)
        kernel = largest(found)
        assert len(kernel.copies) == READERS and kernel.hazard == "onnxruntime-optimisation" and found.missing == ()
        assert all("scaled per output channel" in one.difference for one in kernel.copies[1:])
        assert {one.layout for one in kernel.copies} <= ({"blocked by 8", "blocked by 16"} if blocking else {""})
        assert len({one.layout for one in kernel.copies}) == 1
        # blocks are filled up with zeros, which are bytes like any others
        assert found.wasted_bytes >= (READERS - 1) * 4 * width * width * 9
    # compared with the network, the blocked copies are copies of its anchor
    assert kernel.name == f"anchors.width{width}"
    assert all(kernel.copies[0].layout in one.difference for one in kernel.copies if blocking)


def test_fx_fuse_multiplies_all_scales_into_one_kernel_and_outputs_are_wrong() -> None:
    module = Shared()
    fused = fuse(module)
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert (fused(images) - module(images)).abs().max() > 0.1
    # stored once, so nothing is wasted; what it was shows that it is another kernel now
    assert audit(fused).single
    found = audit(fused, against=module)
    assert not found.single and found.wasted_bytes == 0
    altered = [kernel for kernel in found.kernels if kernel.altered]
    assert [(kernel.name, kernel.hazard) for kernel in altered] == [("shared.weight", "fused-in-turn")]
    assert altered[0].copies[0].difference == ("scaled per output channel",) and altered[0].copies[0].readers == 4


def test_a_kernel_that_one_layer_reads_may_be_fused() -> None:
    module = Shared(layers=1)
    fused = fuse(module)
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(images), module(images), rtol=1e-4, atol=1e-4)
    assert audit(fused, against=module).single


def test_a_fused_state_dict_is_not_the_references(tmp_path: Path) -> None:
    torch.save(fuse(Shared()).state_dict(), tmp_path / "fused.pt")
    found = audit(tmp_path / "fused.pt", against=Shared())
    # a state dict does not tell how many layers read a kernel, so the stem, which one layer reads, is named too
    assert {kernel.name for kernel in found.kernels if kernel.altered} == {"stem.weight", "shared.weight"}


def test_torch_save_keeps_tied_names_tied_and_cloning_unties_them(tmp_path: Path) -> None:
    state = Tied().state_dict()
    torch.save(state, tmp_path / "tied.pt")
    found = audit(tmp_path / "tied.pt")
    assert found.single and len(found.kernels[0].copies[0].names) == 4
    torch.save({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "cloned.pt")
    found = audit(tmp_path / "cloned.pt")
    assert counts(found) == [4] and found.wasted_bytes == 3 * 8 * 8 * 9 * 4
    assert found.kernels[0].hazard == "names-untied"
    assert {one.difference for one in found.kernels[0].copies} == {("exact",)}


def test_safetensors_unties_names_and_refuses_tied_ones(tmp_path: Path) -> None:
    state = Tied().state_dict()
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.torch.save_file(state, tmp_path / "tied.safetensors")
    # what people do then
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "cloned.safetensors")
    found = audit(tmp_path / "cloned.safetensors")
    assert counts(found) == [4] and found.kernels[0].hazard == "names-untied"
    safetensors.torch.save_model(Tied(), str(tmp_path / "model.safetensors"))
    assert audit(tmp_path / "model.safetensors").single


@pytest.mark.parametrize(
    "untie",
    [
        copy.deepcopy,
        lambda module: nn.ModuleList([module, copy.deepcopy(module)]),
        lambda module: _assigned(module),
    ],
)
def test_a_live_module_whose_tie_was_lost_holds_copies(untie: Callable[[nn.Module], nn.Module]) -> None:
    module = Tied()
    assert audit(module).single and len(audit(module).kernels[0].copies[0].names) == 4
    found = audit(untie(module))
    if untie is copy.deepcopy:
        assert found.single
    else:
        assert counts(found)[-1] > 1 and found.kernels[0].hazard == "modules-untied"


def _assigned(module: nn.Module) -> nn.Module:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module


def test_every_hazard_says_what_happened_and_what_to_do() -> None:
    for name, hazard in HAZARDS.items():
        assert hazard.name == name and hazard.what.endswith(".") and hazard.remedy.endswith(".")


def test_a_kernel_quantised_for_each_layer_is_found(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = exported(network(16), tmp_path / "legacy.onnx", dynamo=False)
    quantize_dynamic(path, tmp_path / "int8.onnx", per_channel=True, weight_type=QuantType.QInt8)
    kernel = largest(audit(tmp_path / "int8.onnx"))
    assert len(kernel.copies) == READERS and {one.dtype for one in kernel.copies} == {"int8"}


# ---------------------------------------------------------------- what is single


@pytest.mark.parametrize("name", ["dacnn14", "dacnn18", "dacnn18-reg", "dacnn18-mix-reg"])
def test_a_network_of_ours_stores_each_kernel_once_in_every_format(name: str, tmp_path: Path) -> None:
    module = network(name=name)
    dacnn.save(module, tmp_path / "a.safetensors")
    torch.save(module.state_dict(), tmp_path / "a.pt")
    torch.export.save(torch.export.export(module, (torch.zeros(1, 3, 32, 32),)), tmp_path / "a.pt2")
    exported(module, tmp_path / "a.onnx")
    for artefact in (module, *sorted(tmp_path.iterdir())):
        found = audit(artefact, against=module)
        assert found.single, (artefact, found)
        assert {kernel.name for kernel in found.kernels} >= {
            f"anchors.{anchor}" for anchor in module.anchors if module.anchors[anchor].numel() >= 64
        }


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["dacnn14", "dacnn18", "dacnn18-reg"])
def test_the_unshared_twin_has_no_copies(name: str, trained: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    twin = create(name, width=16, num_classes=5, seed=0, share="none")
    if trained:
        optimiser = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.9)
        images, labels = torch.rand(16, 3, 32, 32), torch.arange(16) % 5
        for _ in range(5):
            optimiser.zero_grad()
            nn.functional.cross_entropy(twin(images), labels).backward()
            optimiser.step()
    twin.eval()
    torch.save({name: tensor.bfloat16() for name, tensor in twin.state_dict().items()}, tmp_path / "bfloat16.pt")
    legacy = exported(twin, tmp_path / "legacy.onnx", dynamo=False)
    for artefact in (twin, tmp_path / "bfloat16.pt", legacy, optimised(legacy)):
        found = audit(artefact)
        # an untrained residual block folds into zeros, of which the exporter keeps one array
        assert found.single and len(found.kernels) > READERS - 2, artefact


def test_fresh_regulators_are_all_the_identity_and_no_copies() -> None:
    found = audit(create("dacnn18-reg", width=16, seed=0))
    assert found.single and sum("regulator" in kernel.name for kernel in found.kernels) == 16


def test_tensors_that_are_no_parameters_are_seen() -> None:
    module = Shared()
    module.register_buffer("cache", module.shared.weight.detach().clone(), persistent=False)
    module.folded = [module.shared.weight.detach() * torch.rand(8, 1, 1, 1)]
    kernel = largest(audit(module))
    assert [one.place for one in kernel.copies] == ["parameter", "buffer", "attribute"]
    assert [one.names[0] for one in kernel.copies] == ["shared.weight", "cache", "folded.0"]


def test_views_of_one_memory_are_one_copy() -> None:
    module = Shared()
    module.register_buffer("wide", module.shared.weight.detach().expand(5, 8, 8, 3, 3))
    module.view = module.shared.weight.detach().reshape(8, 72)
    module.turned = module.shared.weight.detach().transpose(0, 1)
    module.repeated = module.shared.weight.detach().expand(5, 8, 8, 3, 3)
    found = audit(module)
    assert found.single and largest(found).wasted_bytes == 0
    assert any(
        set(one.names) >= {"shared.weight", "wide", "view", "turned"} for kernel in found.kernels for one in kernel.copies
    )


def test_a_reference_that_the_artefact_does_not_hold_is_missing(tmp_path: Path) -> None:
    found = audit(network(), against=randomise(create("dacnn14", width=8, num_classes=5, seed=1), seed=1))
    assert set(found.missing) == {"anchors.stem", "anchors.width8"} and not found.single


# ---------------------------------------------------------------- the command


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit status and what was printed."""
    capsys.readouterr()
    try:
        main(["audit", *map(str, words)])
        status: Any = 0
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_tells_single_copies_and_unreadable_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    dacnn.save(network(), tmp_path / "run" / "best.safetensors")
    status, text, _ = run(capsys, tmp_path / "run")
    assert status == 0 and "Every kernel is stored once." in text
    legacy = exported(network(), tmp_path / "legacy.onnx", dynamo=False)
    status, text, _ = run(capsys, legacy)
    assert status == 1 and "legacy-onnx-export" in text and text.count("scaled per output channel") == READERS - 1
    status, text, error = run(capsys, tmp_path / "nothing.onnx")
    assert status == 2 and text == "" and "no such file" in error and error.count("\n") == 1


def test_the_command_prints_json_with_the_same_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dacnn.save(network(), tmp_path / "a.safetensors")
    status, text, _ = run(capsys, tmp_path / "a.safetensors", "--json")
    assert status == 0 and json.loads(text)["single"] is True
    legacy = exported(network(), tmp_path / "legacy.onnx", dynamo=False)
    status, text, _ = run(capsys, legacy, "--against", tmp_path / "a.safetensors", "--json")
    table = json.loads(text)
    assert status == 1 and table["single"] is False and table["wasted_bytes"] == (READERS - 1) * 4 * 8 * 8 * 9
    kernel = max(table["kernels"], key=lambda row: row["count"])
    assert kernel["name"] == "anchors.width8" and len(kernel["copies"]) == kernel["count"] == READERS
    assert kernel["copies"][1].keys() >= {"names", "place", "shape", "dtype", "nbytes", "difference", "layout"}
    assert table["hazards"][0].keys() == {"name", "what", "remedy"}


def test_the_command_names_a_kernel_that_was_altered_or_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(Shared().state_dict(), tmp_path / "was.pt")
    torch.save(fuse(Shared()).state_dict(), tmp_path / "is.pt")
    status, text, _ = run(capsys, tmp_path / "is.pt", "--against", tmp_path / "was.pt")
    assert status == 1 and "not the reference's shared.weight" in text and "fused-in-turn" in text
    torch.save(Shared(seed=1).state_dict(), tmp_path / "other.pt")
    status, text, _ = run(capsys, tmp_path / "other.pt", "--against", tmp_path / "was.pt")
    assert status == 1 and "does not hold the reference's kernel shared.weight" in text
