"""Configs: TOML there and back, and what is refused, in which words."""

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings

from dacnn.config import Config, DataConfig, NetworkConfig, TrainingConfig, read_config
from dacnn.errors import ConfigError, UnknownNameError
from dacnn.networks.zoo import design_of
from dacnn.training.recipe import load_recipe, recipe_names

TABLES: dict[str, Any] = {"network": NetworkConfig, "data": DataConfig, "training": TrainingConfig}
FIELDS = [(table, item) for table, kind in TABLES.items() for item in dataclasses.fields(kind)]
NAMES = [f"{table}.{item.name}" for table, item in FIELDS]


def kind_of(item: Any) -> Any:
    """The annotation of a field without its `| None`."""
    arguments = [argument for argument in typing.get_args(item.type) if argument is not type(None)]
    return item.type if typing.get_origin(item.type) in (Literal, tuple) or not arguments else arguments[0]


def values_of(item: Any) -> st.SearchStrategy[Any]:
    """Every value that a field may have."""
    kind, low, high = kind_of(item), item.metadata["low"], item.metadata["high"]
    if item.name == "channels":
        return st.sampled_from([1, 3])
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner = st.text() if typing.get_args(kind)[0] is str else st.integers(low, 10**6)
        return st.lists(inner, min_size=1, max_size=5).map(tuple)
    if kind is int:
        return st.integers(low, 10**18 if high is None else high)
    if kind is float:
        return st.floats(low, high, allow_nan=False, allow_infinity=False)
    return st.booleans() if kind is bool else st.text()


def agrees(values: dict[str, Any]) -> bool:
    """Whether no two values exclude each other."""
    return values.get("compile") != "yes" or values.get("recompute") not in ("activations", "segments")


def configs() -> st.SearchStrategy[Config]:
    def table(kind: Any) -> st.SearchStrategy[Any]:
        optional = {item.name: values_of(item) for item in dataclasses.fields(kind)}
        return st.fixed_dictionaries({}, optional=optional).filter(agrees).map(lambda values: kind(**values))

    return st.builds(Config, **{name: table(kind) for name, kind in TABLES.items()})


def read(text: str, folder: Path) -> Config:
    path = folder / "a.toml"
    path.write_bytes(text.encode())
    return read_config(path)


def refusal(text: str, folder: Path) -> str:
    """The message with which a file is refused; it is one line and names the file."""
    with pytest.raises(ConfigError) as caught:
        read(text, folder)
    message = str(caught.value)
    assert message.startswith(str(folder / "a.toml")) and "\n" not in message
    return message


# ---------------------------------------------------------------- there and back


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(configs())
def test_any_config_survives_toml(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    folder = tmp_path_factory.mktemp("config")
    assert read(config.to_toml(), folder) == config


@pytest.mark.parametrize(("table", "item"), FIELDS, ids=NAMES)
def test_every_field_survives_toml_at_a_value_other_than_its_default(table: str, item: Any, tmp_path: Path) -> None:
    kind, low, high = kind_of(item), item.metadata["low"], item.metadata["high"]
    value: Any
    if typing.get_origin(kind) is Literal:
        value = next(word for word in typing.get_args(kind) if word != item.default)
    elif typing.get_origin(kind) is tuple:
        value = ("a+b", "c") if typing.get_args(kind)[0] is str else (3, 1, 2)
    elif kind is bool:
        value = not item.default
    elif kind is str:
        value = 'ä "quoted"\n#text'
    else:
        value = next(v for v in (3, 1, 33, 0.5, low, high) if v not in (None, item.default) and low <= v <= (high or math.inf))
    config = dataclasses.replace(Config(), **{table: TABLES[table](**{item.name: value})})
    again = read(config.to_toml(), tmp_path)
    assert again == config != Config()
    assert getattr(getattr(again, table), item.name) == value


def test_an_empty_file_is_all_defaults_and_defaults_survive(tmp_path: Path) -> None:
    assert read("", tmp_path) == Config()
    assert read(Config().to_toml(), tmp_path) == Config()
    assert read("[training]\nepochs = 3", tmp_path) == Config(training=TrainingConfig(epochs=3))


def test_equal_configs_write_equal_text() -> None:
    assert Config().to_toml() == Config(NetworkConfig(), DataConfig(), TrainingConfig()).to_toml()


def test_every_field_has_help_for_the_command_line() -> None:
    assert all(item.metadata["help"] for _, item in FIELDS)


def test_merging_changes_what_is_given_and_leaves_what_is_none() -> None:
    config = Config(training=TrainingConfig(epochs=7))
    merged = config.merged({"training": {"epochs": None, "lr": 0.5}, "network": {"name": "vgg16", "width": None}})
    assert (merged.training.epochs, merged.training.lr, merged.network.name) == (7, 0.5, "vgg16")
    assert merged.data == config.data and config.training.lr == TrainingConfig().lr
    assert config.merged({}) == config
    with pytest.raises(ConfigError, match=r"training\.epochs is 0"):
        config.merged({"training": {"epochs": 0}})


# ---------------------------------------------------------------- refusals: where, what, what was expected


@pytest.mark.parametrize(("text", "words"), [
    ("[trainign]\n", ["unknown table 'trainign'", "expected one of network, data, training"]),
    ("epochs = 3\n", ["unknown table 'epochs'"]),
    ("training = 3\n", ["'training' is 3", "expected a table, [training]"]),
    ("[[training]]\nepochs = 3\n", ["'training' is", "expected a table"]),
    ("[training]\nepoch = 3\n", ["[training]", "unknown setting 'epoch'", "accumulate", "epochs"]),
    ("[training]\nepochs = \n", ["cannot be read as TOML"]),
    ("\x00", ["cannot be read as TOML"]),
    ("[training]\nepochs = 1\nepochs = 2\n", ["cannot be read as TOML"]),
    ("[training]\nepochs = " + "9" * 5000 + "\n", ["a.toml"]),
    ("a = " + "[" * 100_000, ["cannot be read as TOML"]),
], ids=lambda value: repr(value)[:40])  # fmt: skip
def test_a_document_of_another_form_is_refused(text: str, words: list[str], tmp_path: Path) -> None:
    message = refusal(text, tmp_path)
    assert [word for word in words if word not in message] == []


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read as TOML") as caught:
            read_config(path)
        assert str(path) in str(caught.value)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes\.toml: cannot be read"):
        read_config(tmp_path / "bytes.toml")


def wrong_values(item: Any) -> list[Any]:
    """Values of another type than a field's."""
    kind = kind_of(item)
    if typing.get_origin(kind) is Literal:
        return ["bogus", "", 1, True, ["auto"], {"x": 1}]
    if typing.get_origin(kind) is tuple:
        other: Any = 3 if typing.get_args(kind)[0] is str else "3"
        return [3, "3", [other], [1.5], [True], [[1]], True, {"x": 1}]
    wrong: dict[Any, list[Any]] = {
        int: ["3", 3.0, 1.5, True, False, [3], {"x": 3}, math.nan],
        float: ["0.1", True, False, [0.1], {"x": 1}],
        str: [3, True, 1.5, ["x"], {"x": "x"}],
        bool: ["true", 1, 0, 1.0, [True], {"x": True}],
    }
    return wrong[kind]


def assert_refused_with(table: str, item: Any, value: Any, folder: Path, expected: str) -> None:
    message = refusal(tomli_w.dumps({table: {item.name: value}}), folder)
    assert f"[{table}]" in message, message
    assert f"{table}.{item.name} is " in message, message
    assert expected in message, message


@pytest.mark.parametrize(("table", "item"), FIELDS, ids=NAMES)
def test_a_value_of_another_type_is_refused_with_where_what_and_what_was_expected(
    table: str, item: Any, tmp_path: Path
) -> None:
    for value in wrong_values(item):
        assert_refused_with(table, item, value, tmp_path, "expected ")


@pytest.mark.parametrize(("table", "item"), FIELDS, ids=NAMES)
def test_a_value_out_of_range_is_refused_with_the_range(table: str, item: Any, tmp_path: Path) -> None:
    kind, low, high = kind_of(item), item.metadata["low"], item.metadata["high"]
    listed = typing.get_origin(kind) is tuple
    step = 0.001 if kind is float else 1
    for bound, beyond in ((low, -step), (high, step)):
        if bound is not None:
            value = bound + beyond
            assert_refused_with(
                table, item, [1, value] if listed else value, tmp_path, f"{'at least' if beyond < 0 else 'at most'} {bound}"
            )
            assert getattr(TABLES[table](**{item.name: (bound,) if listed else bound}), item.name) in (bound, (bound,))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(("table", "item"), [(t, i) for t, i in FIELDS if kind_of(i) is float], ids=[
    name for name, (_, i) in zip(NAMES, FIELDS, strict=True) if kind_of(i) is float
])  # fmt: skip
def test_numbers_that_are_none_are_refused(table: str, item: Any, value: float, tmp_path: Path) -> None:
    assert_refused_with(table, item, value, tmp_path, "expected a finite number")


@pytest.mark.parametrize("kind", [int, float])
def test_numbers_beyond_every_float_are_refused_or_kept_without_another_error(kind: type, tmp_path: Path) -> None:
    complaints = {}
    for name, (table, item) in zip(NAMES, FIELDS, strict=True):
        if kind_of(item) is kind:
            try:
                assert (
                    getattr(getattr(read(tomli_w.dumps({table: {item.name: 10**400}}), tmp_path), table), item.name) == 10**400
                )
            except ConfigError as error:
                assert item.name in str(error)
            except Exception as error:
                complaints[name] = repr(error)
    assert complaints == {}


def test_two_channels_are_no_picture(tmp_path: Path) -> None:
    assert "data.channels is 2: expected 1 (grey) or 3 (colour)" in refusal("[data]\nchannels = 2\n", tmp_path)


def test_an_empty_list_of_depths_is_refused(tmp_path: Path) -> None:
    # it would be taken for "not given", and another network than the one asked for would be trained
    assert "network.depths" in refusal("[network]\ndepths = []\n", tmp_path)


@pytest.mark.parametrize("kind", [NetworkConfig, DataConfig, TrainingConfig])
def test_configs_are_values(kind: Any) -> None:
    assert kind() == kind() and hash(kind()) == hash(kind())
    name = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), name, None)


# ---------------------------------------------------------------- recipes


def test_every_recipe_file_has_its_name() -> None:
    import dacnn.recipes

    folder = Path(dacnn.recipes.__path__[0])
    assert recipe_names() == sorted(path.stem for path in folder.glob("*.toml")) != []


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_config_of_a_network_that_exists(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    assert config != Config()
    assert read(config.to_toml(), tmp_path) == config
    design_of(config.network)


def test_a_recipe_may_be_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[training]\nepochs = 3\n")
    assert load_recipe(str(tmp_path / "mine.toml")) == Config(training=TrainingConfig(epochs=3))


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="unknown recipe 'digit': did you mean 'digits'"):
        load_recipe("digit")
