"""Precision and memory format follow what the device can do."""

import pytest
import torch

from dacnn.config import TrainingConfig
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
    }
    assert execution.layout == torch.contiguous_format


def test_the_cpu_has_a_name() -> None:
    assert cpu_name()
