"""A file and a function in it become a network; every way in which that can go wrong is one line that says where."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dacnn.config import NetworkConfig
from dacnn.errors import ConfigError, DacnnError, PlanError, ShapeError
from dacnn.networks.factory import adapted_as, is_factory, make_module, rule_of
from dacnn.networks.plan import Input
from dacnn.sharing.regulators import LowRank, Pointwise
from factories import FILE, GROUPS, KERNEL_PARAMETERS, Views, anchored, chain
from reference import one_thread  # noqa: F401  (a fixture)

TEN = tuple("0123456789")
GREY = Input(32, 32, 1, (0.5,), (0.25,))


def written(path: Path, text: str, function: str = "make") -> str:
    """The name of a factory in a new file."""
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    return f"{path}:{function}"


def made(name: str, num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    return make_module(name, num_classes=num_classes, in_channels=in_channels)


def refused(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        made(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def adapted(**settings: Any) -> Any:
    module = settings.pop("module", None)
    return adapted_as(NetworkConfig(settings.pop("name", f"{FILE}:chain"), **settings), GREY, TEN, module)


# ---------------------------------------------------------------- calling a factory


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("net.py:make", True),
        ("some/where/net.py:Net", True),
        ("net.py", True),
        ("dacnn14", False),
        ("runs/net-make-digits-1", False),
        ("python:Net", False),
        ("my.python:x", False),
        ("runs/net.pyc", False),
    ],
)
def test_a_factory_is_told_from_other_names(name: str, is_one: bool) -> None:
    assert is_factory(name) is is_one


def test_a_factory_is_given_what_it_takes() -> None:
    assert made(f"{FILE}:chain", 7, 3).head.out_features == 7
    assert made(f"{FILE}:chain", 7, 3).stem[0].in_channels == 3
    assert made(f"{FILE}:fixed", 7, 3).head.out_features == 10
    assert made(f"{FILE}:lazy", 7, 3)[-1].out_features == 7
    assert made(f"{FILE}:Views", 7, 3).head.out_features == 7


def test_every_call_gives_a_module_of_its_own() -> None:
    first, second = made(f"{FILE}:chain"), made(f"{FILE}:chain")
    assert first is not second and type(made(f"{FILE}:Views")) is not Views


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nothing", "factories.py:nothing: the factory gave a NoneType: expected an nn.Module"),
        ("needs_width", "the factory failed: TypeError: needs_width() missing 1 required positional argument: 'width'"),
        ("fails", "factories.py:fails: the factory failed: RuntimeError: the first line (factories.py, line "),
        ("leaves", "the factory failed: SystemExit: 3 (factories.py, line "),
        ("ready", "'ready' is a module: expected a function that makes one"),
        ("FILE", "has no function 'FILE': expected "),
        ("absent", "factories.py: has no function 'absent': expected "),
        ("", "factories.py: names no function in the file: expected "),
    ],
)
def test_what_is_wrong_with_a_function_is_one_line(function: str, words: str) -> None:
    assert words in refused(f"{FILE}:{function}")


def test_a_file_without_a_function_names_those_it_has() -> None:
    for name in (f"{FILE}", f"{FILE}:absent"):
        message = refused(name)
        assert "chain" in message and "Views" in message
        assert "dataclass" not in message and "OrderedDict" not in message, "what it imports is none of its functions"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def make(:\n    pass\n", "net.py: cannot be run: SyntaxError: "),
        ("import absent_module\n", "cannot be run: ModuleNotFoundError: No module named 'absent_module' (net.py, line 1)"),
        ("\n\nraise ValueError('a\\nb')\n", "cannot be run: ValueError: a (net.py, line 3)"),
        ("import sys\nsys.exit()\n", "cannot be run: SystemExit (net.py, line 2)"),
        ("", "has no function 'make': expected "),
    ],
)
def test_a_file_that_cannot_be_run_is_one_line_that_says_where(text: str, words: str, tmp_path: Path) -> None:
    assert words in refused(written(tmp_path / "net.py", text))


@pytest.mark.parametrize("name", ["absent.py:make", "absent.py", "absent/net.py:make", ".py:make"])
def test_a_missing_file_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(name).startswith(f"{name}: no such file: expected FILE.py:factory")


def test_an_error_of_ours_in_a_factory_stays_what_it_is(tmp_path: Path) -> None:
    text = "import dacnn, torch\ndef make():\n    return dacnn.anchor(torch.nn.Conv2d(1, 1, 1), [['absent.*']])[0]\n"
    with pytest.raises(PlanError, match="absent"):
        made(written(tmp_path / "net.py", text))


SIBLING = "from torch import nn\n\ndef layers(classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(1024, classes))\n"


@pytest.mark.parametrize(
    "text",
    [
        "from beside import layers\ndef make(num_classes):\n    return layers(num_classes)\n",
        "def make(num_classes):\n    from beside import layers\n    return layers(num_classes)\n",
    ],
    ids=["at the top", "in the function"],
)
def test_a_file_imports_what_stands_beside_it(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside.py").write_text(SIBLING)
    name, path = written(tmp_path / "net.py", text), list(sys.path)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    monkeypatch.chdir(tmp_path)
    assert made(name)[1].out_features == 10
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    assert made("net.py:make", 4)[1].out_features == 4
    assert sys.path == path


def test_files_of_two_folders_import_each_its_own_sibling(tmp_path: Path) -> None:
    for folder, width in (("first", 8), ("second", 16)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "beside_two.py").write_text(f"width = {width}\n")
        text = "from torch import nn\nfrom beside_two import width\ndef make():\n    return nn.Linear(width, width)\n"
        assert made(written(tmp_path / folder / "net.py", text)).in_features == width


def test_classes_of_a_file_can_be_dataclasses_and_copied(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n\n"
        "@dataclass\nclass Sizes:\n    width: int = 10\n\n"
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.sizes = Sizes()\n"
        "        self.head = nn.Linear(1024, self.sizes.width)\n"
        "    def forward(self, x):\n        return self.head(x.flatten(1))\n"
    )
    network = adapted(name=written(tmp_path / "net.py", text, "Net"))
    assert copy.deepcopy(network).module.sizes.width == 10


def test_what_a_factory_prints_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "import factories\nprint('at the top')\ndef make():\n    print('in the function')\n    return factories.chain()\n"
    made(written(tmp_path / "net.py", text))
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "at the top\nin the function\n"


# ---------------------------------------------------------------- sharing as a config says


@pytest.mark.parametrize("share", GROUPS)
def test_layers_share_as_the_config_says(share: str) -> None:
    torch.manual_seed(0)
    network = adapted(share=share)
    assert list(network.conversion.groups.values()) == GROUPS[share]
    assert network.conversion.templates == (4 if share == "template" else None)


def test_listed_groups_and_patterns_share() -> None:
    network = adapted(groups=("a.0+e.*", "[cd].0"))
    assert dict(network.conversion.groups) == {"group0": ("a.0", "e.0"), "group1": ("c.0", "d.0")}


def test_templates_and_regulators_are_taken_over() -> None:
    network = adapted(share="template", templates=2, regulator="low-rank", regulator_rank=3)
    assert network.conversion.templates == 2
    assert sum(isinstance(part, LowRank) and part.down.out_channels == 3 for part in network.modules()) == 5
    assert sum(isinstance(part, Pointwise) for part in adapted(share="stage", regulator="pointwise").modules()) == 5
    assert not any(isinstance(part, Pointwise) for part in adapted(share="stage", regulator="none").modules())


def test_the_start_is_taken_over() -> None:
    module = chain()
    first, mean = (adapted(share="all", start=start, module=module).owner for start in ("first", "mean"))
    kernels = torch.stack([getattr(module, name)[0].weight for name in "abcde"])
    assert torch.equal(first["conv8x8x3x3"], kernels[0])
    torch.testing.assert_close(mean["conv8x8x3x3"], kernels.mean(0))
    with torch.no_grad():
        for factor, name in zip((1.0, -2.0, 0.5, 3.0, 1.5), "abcde", strict=True):
            getattr(module, name)[0].weight.copy_(factor * module.a[0].weight.clone())
            getattr(module, name)[1].eps = 1e-12
    x = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    module.train()(x)
    fitted = adapted(share="all", start="fit", module=module).eval()
    # gains pass through six norms in float32
    torch.testing.assert_close(fitted(x), module.eval()(x), rtol=1e-3, atol=1e-4)


def test_a_module_that_is_given_stays_as_it_is() -> None:
    module = chain().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    network = adapted(share="all", module=module)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert module.training and network.training
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


def test_lazy_layers_share_and_the_module_that_was_given_stays_lazy() -> None:
    network = adapted(name=f"{FILE}:lazy", share="all")
    assert list(network.conversion.groups.values()) == [("1", "3")]
    module = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    adapted(module=module)
    assert module[1].has_uninitialized_params()


def test_layers_that_cannot_share_are_told_with_the_reason() -> None:
    network = adapted(name=f"{FILE}:Tied", share="all")
    assert set(network.refused) == {"first", "second"}
    assert dict(network.conversion.refused) == dict(network.refused)


def test_a_factory_that_shares_by_itself_is_taken_as_it_is() -> None:
    network = adapted(name=f"{FILE}:anchored")
    assert list(network.conversion.groups.values()) == GROUPS["all"]
    assert list(adapted(module=anchored(10, 1)).conversion.groups.values()) == GROUPS["all"]
    for settings in ({"share": "all"}, {"groups": ("a.0+b.0",)}):
        with pytest.raises(ConfigError, match="is given, but the module shares by anchors already: leave it out"):
            adapted(name=f"{FILE}:anchored", **settings)
    with pytest.raises(ConfigError, match="network.regulator is given, but the module shares by anchors already"):
        adapted(module=anchored(10, 1), regulator="shift")
    assert adapted(name=f"{FILE}:anchored", share="none", regulator="none").owner is not None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 8}, r"network.width is 8: it changes networks of the zoo, not '.*factories.py:chain'"),
        ({"depths": (1, 2)}, r"network.depths is \(1, 2\): it changes networks of the zoo"),
        ({"base_width": 8, "share": "all"}, "network.base_width is 8: it changes networks of the zoo"),
        ({"regulator_place": "after-norm"}, "network.regulator_place is after-norm: it changes networks of the zoo"),
        ({"share": "repeat"}, "only networks of the zoo can tile a kernel: use template, stage or all"),
        ({"templates": 2}, "network.templates is 2, but network.share is 'none': expected 'template'"),
        ({"templates": 2, "share": "all"}, "network.templates is 2, but network.share is 'all'"),
        ({"groups": ("a.0+b.0",), "share": "all"}, "network.groups is given, and network.share is 'all': leave one"),
        ({"regulator": "shift"}, "network.regulator is 'shift', but nothing is shared"),
        ({"regulator": "shift", "share": "none"}, "network.regulator is 'shift', but nothing is shared"),
        ({"start": "fit"}, "network.start is 'fit', but nothing is shared"),
        ({"start": "fit", "share": "template"}, "templates begin at the best fit: leave it out"),
        ({"regulator_rank": 2, "share": "all"}, "network.regulator_rank is 2: it needs a network.regulator"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_factory_is_called(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rule_of(NetworkConfig(f"{FILE}:chain", **settings))
    with pytest.raises(ConfigError, match=words):
        adapted(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"groups": ("a.0+absent",)}, PlanError, "names 'absent', which is no layer"),
        ({"groups": ("a.0",)}, PlanError, "expected two or more"),
        ({"groups": ("a.0+stem.0",)}, PlanError, "put them in two groups"),
        ({"share": "all", "regulator": "pointwize"}, DacnnError, "did you mean 'pointwise'"),
        ({"share": "all", "regulator": "low-rank"}, PlanError, "has no rank"),
        ({"name": f"{FILE}:Views", "share": "all", "regulator": "shift"}, ConfigError, "no layers share a kernel for it"),
        ({"share": "template", "templates": 6}, PlanError, "5 layers for 6 templates"),
        ({"name": f"{FILE}:seven_classes"}, ShapeError, r"gives \(2, 7\) for 2 images: expected logits of shape \(2, 10\)"),
        ({"name": f"{FILE}:three_channels"}, ShapeError, "does not run on images of N x 1 x 32 x 32: RuntimeError"),
        ({"name": f"{FILE}:GivesDict"}, ShapeError, "GivesDict gives dict for 2 images"),
        ({"name": f"{FILE}:without_parameters"}, ConfigError, "Flatten has no parameters"),
        ({"module": nn.DataParallel(nn.Flatten())}, DacnnError, "DataParallel"),
    ],
)
def test_what_cannot_be_a_network_is_refused(settings: dict[str, Any], error: type[DacnnError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        adapted(**settings)
    assert "\n" not in str(caught.value)


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    module = chain()
    module.last = module(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ConfigError, match="Sequential cannot be copied: RuntimeError: "):
        adapted(module=module)


def test_sharing_is_what_the_parameters_say() -> None:
    plain, shared = (sum(p.numel() for p in adapted(share=share).parameters()) for share in ("none", "all"))
    assert plain - shared == 4 * KERNEL_PARAMETERS
