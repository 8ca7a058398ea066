"""Networks of every kind as C, side by side in one program, under sanitizers, against the interpreter."""

from typing import Any, get_args

import pytest

import foreign
from c_networks import check, side_by_side
from dacnn.config import NetworkConfig
from dacnn.deploy.c.source import FloatDtype, Winograd, to_c
from dacnn.deploy.lower import lower
from dacnn.deploy.program import Program
from dacnn.networks.factory import adapted_as
from dacnn.networks.network import create
from dacnn.networks.plan import Input
from dacnn.networks.zoo import DESIGNS
from reference import PLACES, REGULATORS, one_thread, randomise, rank_of  # noqa: F401  (a fixture)

# of the largest logit, of networks of tens of layers with random statistics
RELATIVE = 1e-4


def made(name: str, **settings: Any) -> Program:
    return lower(randomise(create(name, num_classes=3, seed=0, **settings)))


def test_every_network_of_the_zoo() -> None:
    check({"zoo": side_by_side(made(name, width=4) for name in DESIGNS)}, relative=RELATIVE)


@pytest.mark.parametrize("dtype", get_args(FloatDtype))
@pytest.mark.parametrize("winograd", get_args(Winograd))
def test_every_scheme_wherever_transformed_kernels_come_from(winograd: Winograd, dtype: FloatDtype) -> None:
    programs = [made("dacnn7", width=16, share=share) for share in ("all", "stage", "template", "repeat", "none")]
    # clang warns of inline functions that nobody calls, which differ with the format
    cc = "clang" if dtype == "bfloat16" else "gcc"
    check({"schemes": side_by_side(programs)}, cc, relative=RELATIVE, winograd=winograd, dtype=dtype)


def test_every_regulator() -> None:
    programs = [
        made("dacnn18", width=4, regulator=kind, regulator_place=place, regulator_rank=rank_of(kind))
        for kind in REGULATORS
        for place in PLACES
    ]
    check({"regulators": side_by_side(programs)}, "clang", relative=RELATIVE)


@pytest.mark.parametrize(
    ("name", "sizes", "side"),
    [
        ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [3, 3], "layer_type": "basic"}, 32),
        ("EfficientNet", {"width_coefficient": 0.1, "depth_coefficient": 0.2, "hidden_dim": 128, "image_size": 32}, 32),
        ("MobileNetV1", {"depth_multiplier": 0.25}, 33),
    ],
)
def test_converted_networks_of_transformers(name: str, sizes: dict[str, Any], side: int) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")(num_labels=5, **sizes)
    module = foreign.stirred(getattr(transformers, f"{name}ForImageClassification")(config))
    network = adapted_as(NetworkConfig(name="foreign.py:make", share="all"), Input(side, side), tuple("abcde"), module)
    check({name: lower(network)}, relative=RELATIVE)


def test_the_code_does_not_grow_with_the_depth() -> None:
    shallow, deep = (to_c(made("dacnn14", width=8, depths=depths), name="net") for depths in ((2, 2, 2), (12, 12, 12)))
    # a row of the table, and each layer's own scale and shift
    assert len(deep.source) - len(shallow.source) < 30 * 700


def test_a_transformed_kernel_is_there_once_however_many_layers_read_it() -> None:
    program = made("dacnn14", width=16)
    shared, unshared = to_c(program, name="net"), to_c(made("dacnn14", width=16, share="none"), name="net")
    assert shared.context_bytes == 4 + 4 * 36 * 16 * (3 + 16) < unshared.context_bytes
    assert to_c(program, name="net", winograd="file").context_bytes == 4
    off = to_c(program, name="net", winograd="off")
    assert (off.context_bytes, off.workspace_bytes) == (4, off.portable_workspace_bytes)
    assert off.portable_workspace_bytes == shared.portable_workspace_bytes < shared.workspace_bytes
