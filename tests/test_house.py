"""The house keeps its order: who imports whom, what is public, what `import dacnn` costs."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import dacnn

SOURCE = Path(dacnn.__file__).parent

# Every file, from the ground up: a file imports only from what stands above it. A new file is added in its place.
ORDER = [
    "errors",
    "config",
    "sharing.groups",
    "sharing.keeping",
    "sharing.parts",
    "sharing.winograd",
    "sharing.segments",
    "sharing.remake",
    "sharing.anchors",
    "sharing.regulators",
    "sharing.layers",
    "sharing.survey",
    "sharing.trace",
    "sharing.conversion",
    "sharing.rules",
    "sharing.start",
    "sharing.readers",
    "sharing.convert",
    "networks.plan",
    "networks.zoo",
    "networks.normalize",
    "networks.classifier",
    "networks.network",
    "networks.fold",
    "networks.adapted",
    "networks.factory",
    "checkpoint",
    "quantization",
    "deploy.program",
    "deploy.cells",
    "deploy.roll",
    "deploy.shapes",
    "deploy.fusion",
    "deploy.rounding",
    "deploy.integers.floats",
    "deploy.integers.calibrate",
    "deploy.integers.program",
    "deploy.integers.kernels",
    "deploy.integers.stores",
    "deploy.integers.quantize",
    "deploy.integers.run",
    "deploy.lowering.graph",
    "deploy.lowering.drafts",
    "deploy.lowering.kernels",
    "deploy.lowering.translation",
    "deploy.lowering.pixels",
    "deploy.lowering.weighted",
    "deploy.lowering.windows",
    "deploy.lowering.pointwise",
    "deploy.lowering.reshapes",
    "deploy.lower",
    "deploy.parity",
    "data.reasons",
    "data.fit",
    "data.records",
    "data.imageset",
    "data.pickles",
    "data.archives",
    "data.folders",
    "data.tables",
    "data.hub",
    "data.parquet",
    "data.split",
    "data.prepare",
    "data.sources",
    "data.batches",
    "runtime",
    "measure.live",
    "measure.count",
    "measure.proposals",
    "measure.stored",
    "measure.tensors",
    "measure.pt2",
    "measure.onnx_arrays",
    "measure.artefacts",
    "measure.layouts",
    "measure.copies",
    "measure.orders",
    "measure.search",
    "measure.hazards",
    "measure.audit",
    "measure.memory_added",
    "measure.process",
    "measure.runtimes",
    "deploy.onnx.shapes",
    "deploy.onnx.graph",
    "deploy.onnx.steps",
    "deploy.onnx.loops",
    "deploy.onnx.model",
    "deploy.pt2",
    "deploy.c.literals",
    "deploy.c.arrays",
    "deploy.c.memory",
    "deploy.c.calls",
    "deploy.c.formats",
    "deploy.c.isa",
    "deploy.c.winograd",
    "deploy.c.fast",
    "deploy.c.translate",
    "deploy.c.prepared",
    "deploy.c.integer_arrays",
    "deploy.c.integer_tables",
    "deploy.c.integer_translate",
    "deploy.c.source",
    "deploy.c.integer_source",
    "deploy.c.provenance",
    "deploy.c.build",
    "deploy.c.target",
    "deploy.c.same_bits",
    "deploy.c.files",
    "deploy.c.wasm",
    "deploy.export",
    "networks.rival",
    "training.precision",
    "deploy.packing.onednn",
    "deploy.packing.chains",
    "deploy.packing.fused",
    "deploy.packing.arithmetic",
    "deploy.packing.cuda_graphs",
    "deploy.packing.steps",
    "deploy.packing.compiled",
    "deploy.packed",
    "training.recipe",
    "training.recompute",
    "training.statistics",
    "training.interrupt",
    "training.quantized",
    "training.evaluate",
    "training.loop",
    "measure.workspace",
    "measure.memory",
    "training.listener",
    "training.state",
    "training.run",
    "training.train",
    "prediction",
    "bench.contenders",
    "bench.twin",
    "bench.peak",
    "bench.torch_backends",
    "bench.onnx_backends",
    "bench.own",
    "bench.peers",
    "bench.tiny",
    "bench.worker",
    "bench.child",
    "bench.results",
    "bench.settings",
    "bench.preparing",
    "bench.measuring",
    "draw",
    "tables",
    "progress",
    "flags",
    "commands.runs",
    "commands.networks",
    "commands.artefacts",
    "commands.benches",
    "cli",
    "__main__",
]

PUBLIC = {
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
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__init__.py"}


def imported(path: Path) -> set[str]:
    """Modules of dacnn that a file imports, anywhere in it, without the leading `dacnn.`; the package itself is ''."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "dacnn"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import: write it out"
            if (node.module or "").split(".")[0] == "dacnn":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    is_module = inner.removeprefix("dacnn.") in FILES
                    # the version is set before anything is loaded, so it may be had anywhere
                    if inner != "dacnn.__version__":
                        found.add(inner if is_module else str(node.module))
    return {name.removeprefix("dacnn").removeprefix(".") for name in found}


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_what_stands_above_it(name: str) -> None:
    assert name in ORDER, f"src/dacnn/{name.replace('.', '/')}.py is new: add '{name}' to ORDER in its place"
    below = {other for other in imported(FILES[name]) if other not in ORDER[: ORDER.index(name)]}
    assert below == set(), f"{name} imports from what does not stand above it"


def test_the_order_names_each_file_once() -> None:
    assert len(ORDER) == len(set(ORDER))


def test_the_order_names_no_file_that_is_gone() -> None:
    assert [name for name in ORDER if name not in FILES] == []


def test_packages_hold_no_code_of_their_own() -> None:
    for path in SOURCE.rglob("__init__.py"):
        if path.parent != SOURCE:
            statements = ast.parse(path.read_text(encoding="utf-8")).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in statements), path


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert not {"utils", "util", "helpers", "common", "misc"} & {part for name in FILES for part in name.split(".")}


@pytest.mark.parametrize(
    "statement", ["import dacnn", "import dacnn.config, dacnn.errors", "import dacnn; dir(dacnn); dacnn.Config"]
)
def test_what_needs_no_network_does_not_load_torch(statement: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); {statement}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code]).returncode == 0


def test_the_public_names_are_these() -> None:
    assert set(dacnn.__all__) == PUBLIC
    assert sorted(dacnn.__all__) == dacnn.__all__ and len(set(dacnn.__all__)) == len(dacnn.__all__)
    assert set(dacnn._HOMES) == PUBLIC
    assert set(dir(dacnn)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_resolves_where_it_lives_and_is_documented(name: str) -> None:
    value, home = getattr(dacnn, name), importlib.import_module(f"dacnn.{dacnn._HOMES[name]}")
    if inspect.ismodule(value):
        # its own home, so that `import dacnn.NAME` works too
        assert value is home and value.__name__ == f"dacnn.{name}"
    else:
        assert value is getattr(home, name) and value.__module__ == home.__name__
    documentation = inspect.getdoc(value) or ""
    # a dataclass without a docstring gets its signature for one
    assert documentation and not documentation.startswith(f"{name}(")


def test_a_type_checker_sees_the_names_that_are_loaded_late() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: alias.name if node.module == "dacnn" else str(node.module).removeprefix("dacnn.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "dacnn"
        for alias in node.names
    }
    assert seen == dacnn._HOMES


def test_a_name_that_is_not_public_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'dacnn' has no attribute 'nothing'"):
        _ = dacnn.nothing


@pytest.mark.parametrize("name", FILES)
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))


def test_every_error_of_ours_is_a_dacnn_error() -> None:
    from dacnn import errors

    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    assert len(kinds) > 5 and all(issubclass(kind, errors.DacnnError) and kind.__doc__ for kind in kinds)
    drawn = errors.__doc__ or ""
    assert [kind.__name__ for kind in kinds if kind.__name__ not in drawn] == []
