"""Precision and memory format follow what the device can do."""

import pytest
import torch

from dacnn.config import TrainingConfig
from dacnn.errors import TrainingError
from dacnn.training.precision import choose, cpu_name, has_bfloat16_units


@pytest.mark.parametrize(("unit", "expected"), [("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2", "float32")])
def test_bfloat16_is_chosen_only_where_the_cpu_has_units_for_it(
    unit: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True}, raising=False)
    execution = choose(TrainingConfig(), "cpu")
    assert execution.precision == expected
    assert expected in execution.describe() and "channels_last" in execution.describe()


def test_a_cpu_of_which_pytorch_cannot_tell_has_no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has_bfloat16_units("cpu")


def test_what_is_asked_for_is_kept() -> None:
    execution = choose(
        TrainingConfig(precision="float32", memory_format="contiguous", threads=1, compile="yes"), "cpu", processes=3
    )
    assert execution.to_table() == {
        "device": "cpu",
        "precision": "float32",
        "memory_format": "contiguous",
        "threads": 1,
        "processes": 3,
        "compiled": True,
        "recompute": "no",
        "convolution": "plain",
    }
    assert execution.layout == torch.contiguous_format


@pytest.mark.parametrize(
    ("units", "expected"),
    [({"avx2"}, "winograd"), ({"avx2", "avx512_f"}, "plain"), ({"avx2", "avx512_f", "avx512_bf16"}, "plain"), (set(), "plain")],
)
def test_winograd_is_chosen_on_a_cpu_with_avx2_alone(units: set[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True), raising=False)
    execution = choose(TrainingConfig(), "cpu")
    assert execution.convolution == expected
    assert ("by Winograd" in execution.describe()) == (expected == "winograd")
    assert choose(TrainingConfig(convolution="plain"), "cpu").convolution == "plain"
    assert choose(TrainingConfig(convolution="winograd", precision="float32"), "cpu").convolution == "winograd"
    # where the step's convolutions are not the library's own
    for settings, foreign in (({"compile": "yes"}, False), ({"quantize": "int8"}, False), ({}, True)):
        assert choose(TrainingConfig(**settings), "cpu", foreign=foreign).convolution == "plain"


@pytest.mark.parametrize(
    ("settings", "foreign", "reason"),
    [
        ({"precision": "bfloat16"}, False, "the precision is bfloat16: add --precision float32"),
        ({"precision": "float32", "compile": "yes"}, False, "the step is compiled: leave one of them out"),
        ({"precision": "float32", "quantize": "int8"}, False, "the network is to be rounded"),
        ({"precision": "float32"}, True, "the network is a module of somebody else's"),
    ],
)
def test_winograd_is_refused_where_it_cannot_be(settings: dict[str, str], foreign: bool, reason: str) -> None:
    with pytest.raises(TrainingError, match=f"training.convolution is 'winograd', but {reason}"):
        choose(TrainingConfig(convolution="winograd", **settings), "cpu", foreign=foreign)


def test_the_cpu_has_a_name() -> None:
    assert cpu_name()
