"""A conversion is data: it survives a file, converts again, and what it cannot mean is refused."""

import json
from typing import Any

import pytest
import torch
from torch import nn

import dacnn
from dacnn.errors import PlanError, UnknownNameError
from dacnn.sharing.conversion import Conversion
from dacnn.sharing.convert import convert, propose
from foreign import WIDTH, chain, make


@pytest.mark.parametrize(
    "settings", [{}, {"regulator": "low-rank", "regulator_rank": 2}, {"regulator": "shift"}, {"templates": 2}], ids=str
)
def test_a_conversion_survives_json_and_converts_again(settings: dict) -> None:
    module, _ = make("unet")
    module.up[0] = nn.LazyConvTranspose2d(WIDTH, 2, stride=2)
    generator = torch.Generator().manual_seed(0)
    shared, mapping = dacnn.anchor(module, generator=generator, **settings)
    assert mapping.refused and propose(module, **settings) == mapping
    read = Conversion.from_table(json.loads(json.dumps(mapping.to_table())))
    assert read == mapping
    again = convert(module, read, generator=torch.Generator().manual_seed(0))
    assert list(again.state_dict()) == list(shared.state_dict())


def test_a_table_that_is_no_conversion_is_refused() -> None:
    for table in (
        {},
        {"groups": 3},
        {"groups": {"a": 1}},
        {"groups": {}, "refused": []},
        {"groups": {}, "templates": "two"},
        {"groups": {}, "depth": 3},
    ):
        with pytest.raises(PlanError, match="not a conversion: "):
            Conversion.from_table(table)


def test_a_conversion_for_another_module_is_refused() -> None:
    mapping = dacnn.anchor(chain(depth=3))[1]
    with pytest.raises(PlanError, match=r"conv8x8x3x3: the module has no layer '2\.0' that can share a kernel"):
        convert(chain(depth=2), mapping)
    with pytest.raises(PlanError, match="kernel has 0 layers, : expected two or more"):
        convert(chain(), Conversion({"kernel": ()}))
    with pytest.raises(PlanError, match="kernel 'own' has the name of something that every module has"):
        convert(chain(), Conversion({"own": ("0.0", "1.0")}))
    with pytest.raises(PlanError, match=r"a kernel is named 'a\.b': expected a name without dots"):
        Conversion({"a.b": ("0.0", "1.0")})
    for groups in ({"one": ("0.0", "0.0")}, {"one": ("0.0", "1.0"), "other": ("2.0", "0.0")}):
        with pytest.raises(PlanError, match=r"layer '0\.0' reads 2 kernels: expected each layer once"):
            Conversion(groups)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "start": ({"start": "best"}, UnknownNameError, "unknown start 'best'"),
    "no start": ({"start": None}, UnknownNameError, "unknown start 'None'"),
    "regulator": ({"regulator": "pointwize"}, UnknownNameError, "unknown regulator 'pointwize': did you mean 'pointwise'"),
    "rank for none": ({"regulator_rank": 2}, PlanError, "regulator_rank is 2, but there is no regulator"),
    "rank missing": ({"regulator": "low-rank"}, PlanError, "regulator 'low-rank' has no rank"),
    "rank of 0": ({"regulator": "low-rank", "regulator_rank": 0}, PlanError, "regulator_rank is 0: expected 1 or more"),
    "rank too many": ({"regulator": "shift", "regulator_rank": 2}, PlanError, "regulator 'shift' takes no rank"),
    "templates": ({"templates": 0}, PlanError, "templates is 0: expected 1 or more"),
    "many templates": ({"templates": 4}, PlanError, "conv8x8x3x3 has 3 layers for 4 templates"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_refused_whatever_the_module(case: str) -> None:
    arguments, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        dacnn.anchor(chain(), **arguments)
    if case != "many templates":
        with pytest.raises(kind, match=message):
            dacnn.anchor(nn.Identity(), **arguments)
