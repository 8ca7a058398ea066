"""The zoo against the paper's table and the words of its text."""

import math
from typing import Any

import pytest
import torch

from dacnn.config import NetworkConfig
from dacnn.errors import ConfigError, DacnnError, PlanError, UnknownNameError
from dacnn.networks.network import Network, create
from dacnn.networks.plan import Input, Plan
from dacnn.networks.zoo import DESIGNS, plan_of
from reference import REGULATORS, one_thread, rank_of  # noqa: F401  (one_thread is a fixture)

# 100 classes, 3 input channels, convolutions without bias, affine norms, linear layer with bias
STORED_PARAMETERS = {
    "dacnn14": 167_140,
    "dacnn18": 168_164,
    "dacnn24": 169_700,
    "dacnn34": 172_260,
    "dacnn18-reg": 430_308,
    "dacnn24-reg": 530_148,
    "dacnn34-reg": 696_548,
    "dacnn14-mix": 4_743_204,
    "dacnn18-mix": 4_916_388,
    "dacnn34-mix": 4_923_812,
    "dacnn18-mix-reg": 5_612_708,
    "dacnn34-mix-reg": 6_181_284,
    "vgg16": 14_770_212,
    "resnet18": 11_220_132,
    "resnet34": 21_328_292,
}

# convolutions of each stage behind the stem; a pooling behind each stage
SMALL_CHAINS = {
    "dacnn3": (1, 1),
    "dacnn5": (1, 1, 1, 1),
    "dacnn7": (1, 1, 2, 2),
    "dacnn9": (2, 2, 2, 2),
    "dacnn11": (2, 2, 3, 3),
}

RESIDUAL = {
    "dacnn18": ((2, 2, 2, 2), (128, 128, 128, 128)),
    "dacnn24": ((2, 3, 4, 2), (128, 128, 128, 128)),
    "dacnn34": ((3, 4, 6, 3), (128, 128, 128, 128)),
    "dacnn18-mix": ((2, 2, 2, 2), (64, 128, 256, 512)),
    "dacnn34-mix": ((3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet18": ((2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": ((3, 4, 6, 3), (64, 128, 256, 512)),
}


def planned(name: str, classes: int = 10, input: Input | None = None, **changes: Any) -> Plan:
    return plan_of(NetworkConfig(name, **changes), input or Input(), tuple(map(str, range(classes))))


def stored_parameters(plan: Plan) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Network(plan).parameters())


@pytest.mark.parametrize("name", STORED_PARAMETERS)
def test_stored_parameters_are_those_of_the_papers_table(name: str) -> None:
    assert stored_parameters(planned(name, classes=100)) == STORED_PARAMETERS[name]


def test_the_unshared_twin_of_dacnn14_stores_what_the_paper_compares_it_with() -> None:
    assert stored_parameters(planned("dacnn14", classes=100).unshared()) == 1_789_156
    assert stored_parameters(planned("dacnn14", classes=100, share="none")) == 1_789_156


@pytest.mark.parametrize("name", sorted(DESIGNS))
def test_stored_parameters_follow_from_the_plan_by_hand(name: str) -> None:
    regulator = {} if DESIGNS[name].share == "none" else {"regulator": "low-rank", "regulator_rank": 2}
    plan = planned(name, classes=7, width=8, **regulator)
    norms = sum(2 * layer.out_channels for layer in plan.layers())
    kernels = sum(math.prod(shape) for shape in {layer.kernel: layer.kernel_shape for layer in plan.layers()}.values())
    regulators = sum(2 * 2 * layer.out_channels for layer in plan.layers() if layer.regulator)
    assert stored_parameters(plan) == norms + kernels + regulators + 7 * plan.features + 7


@pytest.mark.parametrize("name", SMALL_CHAINS)
def test_small_chains_are_a_stem_and_their_stages_on_one_kernel(name: str) -> None:
    plan = planned(name)
    assert plan.stem.kernel_shape == (128, 3, 3, 3)
    assert tuple(len(stage.blocks) for stage in plan.stages) == SMALL_CHAINS[name]
    assert all(stage.pool for stage in plan.stages)
    assert all(len(block.layers) == 1 and not block.residual for stage in plan.stages for block in stage.blocks)
    readers = [layer for layer in plan.layers() if layer is not plan.stem]
    assert {layer.kernel_shape for layer in readers} == {(128, 128, 3, 3)}
    assert len({layer.kernel for layer in readers}) == 1 and plan.stem.kernel != readers[0].kernel
    # the number in these names counts the convolutions; in `dacnn14` and the residual ones it counts the linear layer too
    assert 1 + len(readers) == int(name.removeprefix("dacnn"))


def test_dacnn14_is_a_chain_of_thirteen_convolutions_and_a_linear_layer() -> None:
    plan = planned("dacnn14")
    assert [1 + len(plan.stages[0].blocks), *(len(stage.blocks) for stage in plan.stages[1:])] == [2, 2, 3, 3, 3]
    assert len(list(plan.layers())) == 13 and plan.smallest_side == 32
    assert {name: len(readers) for name, readers in plan.readers().items()} == {"stem": 1, "width128": 12}


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_networks_are_blocks_of_two_convolutions_pooled_between_stages(name: str) -> None:
    plan = planned(name)
    depths, widths = RESIDUAL[name]
    assert tuple(len(stage.blocks) for stage in plan.stages) == depths
    assert tuple(stage.pool for stage in plan.stages) == (True, True, True, False)
    channels = plan.stem.out_channels
    assert channels == widths[0]
    for stage, width in zip(plan.stages, widths, strict=True):
        for block in stage.blocks:
            assert block.residual
            assert [layer.kernel_shape for layer in block.layers] == [(width, channels, 3, 3), (width, width, 3, 3)]
            if channels == width:
                assert block.shortcut is None
            else:
                assert block.shortcut is not None and block.shortcut.kernel_shape == (width, channels, 1, 1)
            channels = width


@pytest.mark.parametrize("name", ["dacnn14-mix", "dacnn18-mix", "dacnn34-mix"])
def test_in_a_mix_the_widening_layers_are_their_own_and_the_rest_of_a_width_shares(name: str) -> None:
    plan = planned(name)
    readers = plan.readers()
    for layer in plan.layers():
        if layer.in_channels != layer.out_channels:
            assert readers[layer.kernel] == [layer]
        else:
            same_shape = [other for other in plan.layers() if other.kernel_shape == layer.kernel_shape]
            assert readers[layer.kernel] == same_shape


def test_the_first_two_stages_of_the_mixed_chain_share_nothing() -> None:
    plan = planned("dacnn14-mix")
    readers = plan.readers()
    assert [len(readers[layer.kernel]) for layer in plan.layers() if layer.out_channels <= 128] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["dacnn14", "dacnn18", "dacnn18-mix", "vgg16"])
def test_sharing_words_say_who_reads_one_kernel(name: str) -> None:
    def groups(plan: Plan) -> list[list[str]]:
        return sorted([layer.name for layer in readers] for readers in plan.readers().values() if len(readers) > 1)

    assert groups(planned(name, share="none")) == []
    for group in groups(planned(name, share="stage")):
        assert len({layer.split(".")[0] for layer in group}) == 1
    by_stage = {layer for group in groups(planned(name, share="stage")) for layer in group}
    by_shape = {layer for group in groups(planned(name, share="all")) for layer in group}
    assert by_stage <= by_shape and by_shape


@pytest.mark.parametrize("classes", [1, 2, 1000])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_classes_and_channels_are_free(classes: int, channels: int) -> None:
    network = create("dacnn3", num_classes=classes, in_channels=channels, width=2)
    assert network(torch.zeros(2, channels, 32, 32)).shape == (2, classes)


@pytest.mark.parametrize("width", [1, 2, 7, 200])
def test_width_is_free_where_all_stages_are_equal(width: int) -> None:
    assert {layer.out_channels for layer in planned("dacnn14", width=width).layers()} == {width}


@pytest.mark.parametrize(("width", "widths"), [(1, (1, 2, 4, 8)), (8, (8, 16, 32, 64)), (96, (96, 192, 384, 768))])
def test_width_scales_all_stages_of_a_mix(width: int, widths: tuple[int, ...]) -> None:
    plan = planned("dacnn18-mix", width=width)
    assert tuple(stage.blocks[-1].layers[-1].out_channels for stage in plan.stages) == widths


@pytest.mark.parametrize("depths", [(1,), (1, 1), (5, 1, 2), (1, 1, 1, 1, 1), (1,) * 5])
def test_depth_is_free_in_number_and_in_each_stage(depths: tuple[int, ...]) -> None:
    assert tuple(len(stage.blocks) for stage in planned("dacnn18", depths=depths).stages) == depths
    chain = tuple(len(stage.blocks) for stage in planned("dacnn14", depths=depths).stages)
    assert (chain[0] + 1, *chain[1:]) == depths


def test_an_unknown_network_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown network 'dacn14'.*did you mean 'dacnn14'"):
        create("dacn14")


def test_a_name_that_is_like_no_other_is_refused_with_all_names() -> None:
    with pytest.raises(UnknownNameError, match="expected one of dacnn11, dacnn14,"):
        create("?")


def test_a_width_that_cannot_keep_the_ratio_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dacnn.networks import zoo

    monkeypatch.setitem(zoo.DESIGNS, "odd", zoo.Design("chain", (2, 1), (4, 6)))
    assert [stage.blocks[0].layers[0].out_channels for stage in planned("odd", width=2).stages] == [2, 3]
    with pytest.raises(ConfigError, match=r"network\.width is 3.*\(4, 6\).*ratio"):
        planned("odd", width=3)


@pytest.mark.parametrize(("name", "smallest"), [("dacnn3", 4), ("dacnn5", 16), ("dacnn14", 32), ("dacnn18", 8)])
def test_an_input_that_cannot_be_halved_often_enough_is_refused(name: str, smallest: int) -> None:
    assert planned(name, input=Input(smallest, smallest)).smallest_side == smallest
    for input in (Input(smallest - 1, smallest), Input(smallest, smallest - 1)):
        with pytest.raises(PlanError, match=f"too small.*at least {smallest} pixels"):
            planned(name, input=input)


# ---------------------------------------------------------------- regulators


@pytest.mark.parametrize("kind", REGULATORS)
@pytest.mark.parametrize("name", ["dacnn14", "dacnn18", "dacnn18-mix", "dacnn14-mix"])
def test_before_the_norm_a_regulator_stands_behind_each_shared_convolution(name: str, kind: str) -> None:
    plan = planned(name, regulator=kind, regulator_rank=rank_of(kind))
    readers = plan.readers()
    for layer in plan.layers():
        shared = len(readers[layer.kernel]) > 1
        assert (layer.regulator is not None) == shared
        assert layer.regulator is None or (layer.regulator.kind, layer.regulator.place) == (kind, "before-norm")


@pytest.mark.parametrize("name", ["dacnn18", "dacnn34", "dacnn18-mix", "dacnn34-mix"])
def test_after_the_norm_a_regulator_stands_once_a_block_on_a_shared_last_layer(name: str) -> None:
    plan = planned(name, regulator="pointwise", regulator_place="after-norm")
    readers = plan.readers()
    for block in (block for stage in plan.stages for block in stage.blocks):
        *inner, last = block.layers
        assert all(layer.regulator is None for layer in inner)
        assert (last.regulator is not None) == (len(readers[last.kernel]) > 1)
        assert last.regulator is None or last.regulator.place == "after-norm"
        assert block.shortcut is None or block.shortcut.regulator is None


def test_the_mixed_networks_of_the_paper_regulate_each_block_behind_its_second_norm() -> None:
    for name, blocks in (("dacnn18-mix-reg", 8), ("dacnn34-mix-reg", 16)):
        regulated = [layer for layer in planned(name).layers() if layer.regulator]
        assert len(regulated) == blocks
        assert all(layer.regulator and layer.regulator.place == "after-norm" for layer in regulated)


def test_a_regulated_design_that_is_told_to_share_nothing_has_no_regulators() -> None:
    plan = planned("dacnn18-reg", width=8, share="none")
    assert not any(layer.regulator for layer in plan.layers())


@pytest.mark.parametrize("name", ["dacnn18-reg", "dacnn18-mix-reg"])
def test_none_takes_the_regulators_of_a_design_away(name: str) -> None:
    plan = planned(name, regulator="none")
    assert not any(layer.regulator for layer in plan.layers())
    assert plan.stages == planned(name.removesuffix("-reg")).stages


def test_another_regulator_stands_where_the_designs_own_stood() -> None:
    plan = planned("dacnn18-mix-reg", regulator="low-rank", regulator_rank=3)
    kinds = [layer.regulator for layer in plan.layers() if layer.regulator]
    assert len(kinds) == 8
    assert {(kind.kind, kind.place, kind.rank) for kind in kinds} == {("low-rank", "after-norm", 3)}


def test_a_missing_rank_is_refused() -> None:
    with pytest.raises(PlanError, match="'low-rank' has no rank"):
        create("dacnn3", regulator="low-rank")


@pytest.mark.parametrize("kind", ["pointwise", "depthwise", "shift"])
def test_a_rank_where_none_is_taken_is_refused(kind: str) -> None:
    with pytest.raises(PlanError, match=f"'{kind}' takes no rank, got 4"):
        create("dacnn3", regulator=kind, regulator_rank=4)


@pytest.mark.parametrize("changes", [{"regulator_rank": 4}, {"regulator_place": "after-norm"}])
def test_words_about_a_regulator_need_a_regulator(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"need a network\.regulator"):
        create("dacnn14", **changes)


@pytest.mark.parametrize("name", ["dacnn14", "dacnn3", "vgg16", "resnet18"])
def test_an_unknown_regulator_is_refused_whatever_the_network_shares(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown regulator 'pointwize'.*did you mean 'pointwise'"):
        create(name, width=8, regulator="pointwize")


def test_a_regulator_that_would_stand_nowhere_is_refused() -> None:
    # silence would let somebody report "ResNet with regulators" that has none
    with pytest.raises(DacnnError):
        create("vgg16", width=8, regulator="pointwise")


# ---------------------------------------------------------------- create


def test_create_takes_a_name_a_config_and_a_plan_for_the_same_network() -> None:
    by_name = create("dacnn18", width=4, depths=(1, 2), num_classes=3, seed=1)
    by_config = create(NetworkConfig("dacnn18", width=4, depths=(1, 2)), num_classes=3, seed=1)
    by_plan = create(by_name.plan, seed=1)
    assert by_name.plan == by_config.plan == by_plan.plan
    for other in (by_config, by_plan):
        for name, tensor in by_name.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_seed_fixes_every_start_value_whatever_the_global_generator_says() -> None:
    torch.manual_seed(5)
    first = create("dacnn18", width=4, regulator="low-rank", regulator_rank=2, seed=3).state_dict()
    torch.manual_seed(6)
    second = create("dacnn18", width=4, regulator="low-rank", regulator_rank=2, seed=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_seeds_give_other_kernels() -> None:
    first, second = (create("dacnn3", width=4, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.anchors["width4"], second.anchors["width4"])


def test_kernels_start_with_the_variance_that_keeps_activations_level() -> None:
    network = create("dacnn18", width=64, seed=0)
    kernel = network.anchors["width64"].detach()
    # 36,864 normal draws: the standard deviation of their standard deviation is 0.4 %, so 2 % is five of those
    assert float(kernel.std()) == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)


def test_the_kernel_of_a_chain_starts_as_half_such_a_draw_and_the_identity() -> None:
    chain, residual = (create(name, width=8, seed=0).anchors for name in ("dacnn14", "dacnn18"))
    identity = torch.zeros(8, 8, 3, 3)
    identity[range(8), range(8), 1, 1] = 1
    assert torch.equal(chain["stem"], residual["stem"])
    # the same draw, halved: float32 rounds once
    torch.testing.assert_close(chain["width8"].detach(), 0.5 * residual["width8"].detach() + identity, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wrong", [{"num_classes": 0}, {"in_channels": 0}, {"num_classes": -1}])
def test_create_refuses_a_network_without_classes_or_channels(wrong: dict[str, int]) -> None:
    with pytest.raises(DacnnError, match="expected 1 or more"):
        create("dacnn3", **wrong)  # type: ignore[arg-type]


def test_create_refuses_a_change_that_does_not_exist_and_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"create: unknown setting 'widht': expected one of base_width, depths.*width"):
        create("dacnn3", widht=8)


def test_a_plan_takes_no_changes() -> None:
    plan = planned("dacnn3", width=4)
    with pytest.raises(DacnnError, match="create got a plan and width: change the plan"):
        create(plan, width=8)
