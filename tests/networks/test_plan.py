"""The plan as a value: what JSON says of it, what it refuses."""

import json
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from dacnn.config import NetworkConfig
from dacnn.errors import DacnnError, PlanError
from dacnn.networks.network import Network
from dacnn.networks.plan import Block, Input, Layer, Plan, Regulator, Stage
from dacnn.networks.zoo import DESIGNS, plan_of
from reference import REGULATORS, changed, is_of, one_thread, plans, rank_of  # noqa: F401  (one_thread is a fixture)

few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def planned(name: str, **changes: Any) -> Plan:
    return plan_of(NetworkConfig(name, **changes), Input(), ("cat", "dog"))


def small() -> dict[str, Any]:
    """A plan that uses every word, as the JSON tree that tests tamper with."""
    layer = Layer("a.conv", "shared", 4, 4, regulator=Regulator("low-rank", "after-norm", 2))
    wide = Layer("b.conv", "wide", 4, 6, kernel_size=5)
    around = Layer("b.shortcut", "around", 4, 6, kernel_size=1)
    blocks = (Block((layer, replace(layer, name="a.conv2")), residual=True), Block((wide,), residual=True, shortcut=around))
    input = Input(24, 20, 1, (0.25,), (0.75,), "pad")
    plan = Plan("small", input, ("cat", "dog"), Layer("stem", "stem", 1, 4), (Stage(blocks, pool=False), Stage(())))
    tree = json.loads(plan.to_json())
    assert Plan.from_json(json.dumps(tree)) == plan
    return tree


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", sorted(DESIGNS))
@pytest.mark.parametrize("share", ["all", "stage", "none"])
def test_every_network_of_the_zoo_survives_json(name: str, share: Any) -> None:
    plan = planned(name, width=8, share=share, regulator="none")
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("kind", REGULATORS)
@pytest.mark.parametrize("place", ["before-norm", "after-norm"])
def test_every_regulator_survives_json(kind: str, place: Any) -> None:
    plan = planned("dacnn18", regulator=kind, regulator_place=place, regulator_rank=rank_of(kind))
    assert Plan.from_json(plan.to_json()) == plan


@few
@given(plans())
def test_any_plan_survives_json_and_gives_the_same_text_again(plan: Plan) -> None:
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan and is_of(Plan, again)
    assert again.to_json() == text
    assert "\n" not in text


@few
@given(plans())
def test_what_json_cannot_say_otherwise_is_said_once(plan: Plan) -> None:
    # an object with its keys the other way round is the same plan
    turned = json.dumps(json.loads(plan.to_json(), object_pairs_hook=lambda pairs: dict(reversed(pairs))))
    assert Plan.from_json(turned) == plan


def test_equal_plans_give_equal_text_however_their_numbers_were_written() -> None:
    whole = planned("dacnn3").for_data(Input(mean=(0, 0, 0), std=(1, 1, 1)), ("cat",))
    real = planned("dacnn3").for_data(Input(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), ("cat",))
    assert whole == real
    assert whole.to_json() == real.to_json()


def test_class_names_may_hold_any_text() -> None:
    names = ("", " ", "Käse", "猫", "\x00", 'a"b', "\ud800", "x" * 10_000, "cat", "cat")
    plan = replace(planned("dacnn3"), classes=names)
    assert Plan.from_json(plan.to_json()).classes == names


# ---------------------------------------------------------------- tampering


def places_in(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON tree."""
    inner = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [path, *(deeper for key, value in inner for deeper in places_in(value, (*path, key)))]


def without(tree: Any, path: tuple[Any, ...]) -> Any:
    """A copy of the tree that lacks what stands at `path`."""
    if len(path) == 1:
        copy = dict(tree) if isinstance(tree, dict) else list(tree)
        del copy[path[0]]
        return copy
    return changed(tree, path[:1], without(tree[path[0]], path[1:]))


def complaint(tree: Any) -> str:
    """What is wrong with how a tree is read: empty where it is refused properly, or is a plan with the right types."""
    try:
        plan = Plan.from_json(json.dumps(tree))
    except PlanError:
        return ""
    except Exception as error:
        return f"raises {type(error).__name__}: {error}"
    if not is_of(Plan, plan):
        return "is accepted with a value of the wrong type"
    return "" if Plan.from_json(plan.to_json()) == plan else "does not survive JSON"


JUNK: list[Any] = [
    *(None, True, 0, 1, -1, 2.5, 3.0, 10**30, float("nan"), float("inf"), "", "x", "3", "a.b"),
    *([], {}, [[]], [None], [1], ["x"], {"x": 1}, {"name": []}, [{"x": {"y": [{}]}}]),
]


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_junk_anywhere_in_a_plan_is_refused_or_harmless(junk: Any) -> None:
    tree = small()
    tampered = {path: complaint(changed(tree, path, junk)) for path in places_in(tree)}
    assert {path: words for path, words in tampered.items() if words} == {}


def test_a_missing_value_is_refused_or_the_default() -> None:
    tree = small()
    tampered = {path: complaint(without(tree, path)) for path in places_in(tree) if path}
    assert {path: words for path, words in tampered.items() if words} == {}


def test_an_unknown_field_is_refused_by_name_wherever_it_stands() -> None:
    tree = small()
    for path in places_in(tree):
        node: Any = tree
        for key in path:
            node = node[key]
        if isinstance(node, dict):
            with pytest.raises(PlanError, match="has no field 'colour'"):
                Plan.from_json(json.dumps(changed(tree, path, {**node, "colour": 1})))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
FLAT = SCALARS | st.lists(SCALARS) | st.dictionaries(st.text(), SCALARS)


@few
@given(FLAT | st.lists(FLAT) | st.dictionaries(st.text(), FLAT))
def test_json_that_is_no_plan_is_refused(junk: Any) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json(json.dumps(junk))


TEXTS = ["", " ", "{", "[]", "null", "nan", "[" * 100_000, '{"a":' * 100_000, "9" * 5_000, '{"input":{"input":{}}}', "\x00"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json(text)


def test_a_plan_that_halves_its_input_without_end_is_refused() -> None:
    tree = small()
    tree["stages"] = [{"blocks": []}] * 20_000
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(tree))
    stem = Layer("stem", "stem", 3, 4)
    with pytest.raises(PlanError):
        Plan("deep", Input(), ("cat",), stem, (Stage(()),) * 20_000)


UNBUILDABLE: dict[str, dict[tuple[Any, ...], Any]] = {
    "kernel with a dot": {("stem", "kernel"): "a.b"},
    "kernel without a name": {("stem", "kernel"): ""},
    "kernel named as a method of a module": {("stem", "kernel"): "forward"},
    "kernel of negative size": {("stem", "kernel_size"): -3},
    "kernel too large for any memory": {("stages", 0, "blocks", 1, "layers", 0, "kernel_size"): 10**30 + 1},
    "regulator of an unknown kind": {("stages", 0, "blocks", 0, "layers", 0, "regulator", "kind"): "x"},
    "regulator in an unknown place": {("stages", 0, "blocks", 0, "layers", 0, "regulator", "place"): "x"},
    "rank below one": {("stages", 0, "blocks", 0, "layers", 0, "regulator", "rank"): -1},
    "rank of zero": {("stages", 0, "blocks", 0, "layers", 0, "regulator", "rank"): 0},
    "rank missing": {("stages", 0, "blocks", 0, "layers", 0, "regulator", "rank"): None},
    "residual block without layers": {("stages", 0, "blocks", 0, "layers"): []},
    "last block without layers": {("stages", 0, "blocks", 1): {"layers": []}, ("stages", 0, "blocks", 0): {"layers": []}},
    "standard deviation that is no number": {("input", "std", 0): float("nan")},
    "mean that is no number": {("input", "mean", 0): float("inf")},
    "no classes": {("classes",): []},
}


@pytest.mark.parametrize("case", UNBUILDABLE)
def test_a_plan_that_cannot_be_built_is_refused_in_our_words(case: str) -> None:
    tree = small()
    for path, value in UNBUILDABLE[case].items():
        tree = changed(tree, path, value)
    with pytest.raises(DacnnError), torch.device("meta"):
        Network(Plan.from_json(json.dumps(tree)))


# ---------------------------------------------------------------- plans that contradict themselves


def plan_of_layers(*layers: Layer, stem: Layer | None = None, **changes: Any) -> Plan:
    blocks = tuple(Block((layer,), **changes) for layer in layers)
    return Plan("made", Input(), ("cat",), stem or Layer("stem", "stem", 3, 4), (Stage(blocks),))


def test_a_layer_that_takes_other_channels_than_it_is_given_is_refused() -> None:
    with pytest.raises(PlanError, match="layer 'wide' takes 8 channels, but what stands before it gives 4"):
        plan_of_layers(Layer("wide", "wide", 8, 8))


def test_a_stem_that_takes_other_channels_than_the_images_have_is_refused() -> None:
    with pytest.raises(PlanError, match="layer 'stem' takes 1 channels, but what stands before it gives 3"):
        plan_of_layers(stem=Layer("stem", "stem", 1, 4))


def test_a_residual_block_that_widens_needs_a_shortcut() -> None:
    with pytest.raises(PlanError, match="block of 'wide' adds 4 channels to 8: give it a shortcut"):
        plan_of_layers(Layer("wide", "wide", 4, 8), residual=True)
    plan = plan_of_layers(Layer("wide", "wide", 4, 8), residual=True, shortcut=Layer("around", "around", 4, 8, 1))
    assert plan.features == 8


def test_a_shortcut_that_gives_other_channels_than_its_block_is_refused() -> None:
    with pytest.raises(PlanError, match="adds 6 channels to 8"):
        plan_of_layers(Layer("wide", "wide", 4, 8), residual=True, shortcut=Layer("around", "around", 4, 6, 1))


@pytest.mark.parametrize(
    "second",
    [Layer("second", "shared", 4, 8), Layer("second", "shared", 4, 4, kernel_size=1), Layer("second", "shared", 4, 2)],
    ids=["wider", "smaller kernel", "narrower"],
)
def test_readers_that_disagree_on_their_kernels_shape_are_refused(second: Layer) -> None:
    with pytest.raises(PlanError, match=r"layer 'second' needs a kernel of .* but 'shared' is .* for 'first'.*give it its own"):
        plan_of_layers(Layer("first", "shared", 4, 4), second)


def test_two_layers_of_one_name_are_refused() -> None:
    with pytest.raises(PlanError, match="several layers named 'twice'"):
        plan_of_layers(Layer("twice", "a", 4, 4), Layer("twice", "b", 4, 4))


@pytest.mark.parametrize("shape", [(4, 0, 3), (4, -1, 3), (4, 4, 2), (4, 4, 0), (4, 4, -1)])
def test_a_layer_without_channels_or_with_an_even_kernel_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(PlanError, match="layer 'odd' has shape"):
        plan_of_layers(Layer("odd", "odd", *shape))


@pytest.mark.parametrize(
    "values",
    [
        {"channels": 2},
        {"mean": (0.5,)},
        {"std": (0.5,)},
        {"std": (1.0, 0.0, 1.0)},
        {"std": (1.0, -1.0, 1.0)},
        {"height": 0},
        {"channels": 0, "mean": (), "std": ()},
    ],
    ids=str,
)
def test_an_input_that_contradicts_itself_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        Input(**values)


# ---------------------------------------------------------------- the unshared twin


@few
@given(plans())
def test_the_unshared_twin_has_the_same_shapes_and_no_two_readers_of_a_kernel(plan: Plan) -> None:
    twin = plan.unshared()
    assert [layer.kernel_shape for layer in twin.layers()] == [layer.kernel_shape for layer in plan.layers()]
    assert [layer.name for layer in twin.layers()] == [layer.name for layer in plan.layers()]
    assert all(len(readers) == 1 for readers in twin.readers().values())
    assert not any(layer.regulator for layer in twin.layers())
    assert (twin.input, twin.classes) == (plan.input, plan.classes)
    assert [stage.pool for stage in twin.stages] == [stage.pool for stage in plan.stages]


def test_the_unshared_twin_keeps_layers_apart_whose_names_differ_in_a_dot_only() -> None:
    plan = plan_of_layers(Layer("a.b", "shared", 4, 4), Layer("a_b", "shared", 4, 4))
    assert all(len(readers) == 1 for readers in plan.unshared().readers().values())


def test_the_unshared_dacnn14_is_the_chain_that_shares_nothing() -> None:
    assert planned("dacnn14").unshared().stages == planned("dacnn14", share="none").stages


@few
@given(plans())
def test_kernels_and_readers_say_the_same_of_a_plan(plan: Plan) -> None:
    assert list(plan.kernels()) == list(plan.readers())
    for kernel, readers in plan.readers().items():
        assert {layer.kernel_shape for layer in readers} == {plan.kernels()[kernel]}
    assert sum(map(len, plan.readers().values())) == len(list(plan.layers()))


def test_for_data_changes_input_and_classes_and_nothing_else() -> None:
    plan = planned("dacnn18", width=8)
    input = Input(64, 48, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "stretch")
    moved = plan.for_data(input, ("one",))
    assert (moved.input, moved.classes) == (input, ("one",))
    assert moved == replace(plan, input=input, classes=("one",))
    with pytest.raises(PlanError, match="takes 3 channels"):
        plan.for_data(Input(32, 32, 1, (0.5,), (0.5,)), ("one",))
