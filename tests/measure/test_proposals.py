"""What a plan promises is what is stored when it is done; what it chooses fits, and nothing larger that fits is passed over."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dacnn
from dacnn.checkpoint import save
from dacnn.config import NetworkConfig
from dacnn.errors import ConfigError
from dacnn.measure.proposals import UNSHARED, Proposal, parse_bytes, propose_sharing
from dacnn.networks.factory import adapted_as
from dacnn.networks.plan import Input
from factories import FILE, KERNEL_PARAMETERS
from reference import one_thread  # noqa: F401  (a fixture)

TEN = tuple("0123456789")
GREY = Input(32, 32, 1, (0.5,), (0.25,))
CHAIN = NetworkConfig(f"{FILE}:chain")
MIX = NetworkConfig("dacnn18-mix", width=2)
NETWORKS = [
    CHAIN,
    NetworkConfig(f"{FILE}:Tied"),
    NetworkConfig(f"{FILE}:chain", regulator="low-rank", regulator_rank=2),
    MIX,
    NetworkConfig("dacnn7", width=8, regulator="pointwise"),
    NetworkConfig("dacnn14-reg", width=4),
    NetworkConfig("dacnn3", width=8, regulator="shift"),
]


def proposed(config: NetworkConfig, **more: Any) -> tuple[list[Proposal], Proposal | None]:
    return propose_sharing(config, GREY, TEN, **more)


def built(config: NetworkConfig, proposal: Proposal) -> torch.nn.Module:
    """The network as `train` would make it; a regulator only where a kernel is shared for it to stand behind."""
    settings: dict[str, Any] = dict(proposal.settings)
    if proposal.kernels == 0:
        settings |= {"regulator": "none", "regulator_rank": None}
    config = dataclasses.replace(config, **settings)
    if ".py:" in config.name:
        return adapted_as(config, GREY, TEN)
    return dacnn.create(config, in_channels=1, num_classes=10)


def bytes_of(network: torch.nn.Module, bytes_per_value: int, tmp_path: Path) -> int:
    """Bytes of the tensors in its file, read by safetensors alone."""
    save(network, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors").values()
    return sum(tensor.numel() * (bytes_per_value if tensor.is_floating_point() else 8) for tensor in tensors)


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: f"{Path(config.name).name}-{config.regulator}")
@pytest.mark.parametrize("bytes_per_value", [4, 1])
def test_every_proposal_stores_what_the_built_network_stores(
    config: NetworkConfig, bytes_per_value: int, tmp_path: Path
) -> None:
    found, _ = proposed(config, bytes_per_value=bytes_per_value)
    for proposal in found:
        network = built(config, proposal)
        assert proposal.stored_bytes == bytes_of(network, bytes_per_value, tmp_path), proposal.flags
        assert proposal.stored_parameters == sum(parameter.numel() for parameter in network.parameters())
    sizes = [proposal.stored_bytes for proposal in found]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("config", [CHAIN, MIX], ids=["foreign", "zoo"])
def test_every_way_is_proposed_once(config: NetworkConfig) -> None:
    flags = [proposal.flags for proposal in proposed(config)[0]]
    expected = {"--share none", "--share isomorphic", "--share stage", "--share all"}
    expected |= {"--share template --templates 4", "--share template --templates 2"}
    expected |= {"--share repeat"} if config is MIX else set()
    assert len(flags) == len(set(flags)) and set(flags) == expected


def test_kernels_and_readers_are_counted() -> None:
    counted = {proposal.flags: (proposal.kernels, proposal.readers) for proposal in proposed(CHAIN)[0]}
    assert counted["--share none"] == (0, 0)
    assert counted["--share isomorphic"] == (2, 4)
    assert counted["--share stage"] == (2, 5)
    assert counted["--share template --templates 4"] == counted["--share all"] == (1, 5)


def test_tied_tensors_are_counted_once() -> None:
    (unshared,) = proposed(NetworkConfig(f"{FILE}:Tied", share="none"))[0]
    # stem, head, three kernels of their own, biases; two buffers, of which one is a part of the other
    parameters = 8 * 9 + 8 + 8 * 10 + 10 + 3 * KERNEL_PARAMETERS + 4 * 8
    assert unshared.stored_parameters == parameters
    assert unshared.stored_bytes == 4 * (parameters + 10 + 3)


# ---------------------------------------------------------------- budgets


def some_budgets(config: NetworkConfig) -> list[int]:
    sizes = sorted(proposal.stored_bytes for proposal in proposed(config)[0])
    return sorted({size + offset for size in sizes for offset in (-1, 0) if size + offset >= sizes[0]} | {10**9})


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: f"{Path(config.name).name}-{config.regulator}")
def test_the_chosen_one_fits_and_no_larger_one_does(config: NetworkConfig, tmp_path: Path) -> None:
    for budget in some_budgets(config):
        found, chosen = proposed(config, budget_bytes=budget)
        assert chosen is not None and chosen.stored_bytes <= budget
        unshared = next(proposal for proposal in found if proposal.settings == UNSHARED)
        # a bank of more templates than layers is larger than sharing nothing: nobody is sent there
        larger = [one for one in found if chosen.stored_bytes < one.stored_bytes <= min(budget, unshared.stored_bytes)]
        assert larger == []
        assert chosen.stored_bytes <= unshared.stored_bytes
        assert bytes_of(built(config, chosen), 4, tmp_path) == chosen.stored_bytes


def test_where_nothing_need_be_shared_nothing_is() -> None:
    for config in (CHAIN, MIX):
        _, chosen = proposed(config, budget_bytes=10**9)
        assert chosen is not None and chosen.settings == UNSHARED


def test_single_groups_are_shared_where_a_whole_way_is_more_than_needed() -> None:
    config = dataclasses.replace(CHAIN, share="stage")
    unshared = proposed(config)[0][0].stored_bytes
    # one kernel of c, d and e instead of three is enough
    _, chosen = proposed(config, budget_bytes=unshared - 4 * KERNEL_PARAMETERS)
    assert chosen is not None and chosen.settings == {"groups": ("c.0+d.0+e.0",)}
    assert chosen.flags == "--groups 'c.0+d.0+e.0'" and (chosen.kernels, chosen.readers) == (1, 3)
    config = dataclasses.replace(MIX, share="stage")
    unshared = proposed(config)[0][0].stored_bytes
    _, chosen = proposed(config, budget_bytes=unshared - 1)
    # the widest stage saves most
    layers = "stage3.block0.conv1+stage3.block1.conv0+stage3.block1.conv1"
    assert chosen is not None and chosen.settings == {"groups": (layers,)}


def test_a_budget_that_is_too_small_is_told_the_smallest() -> None:
    found, _ = proposed(CHAIN)
    with pytest.raises(ConfigError) as caught:
        proposed(CHAIN, budget_bytes=found[-1].stored_bytes - 1)
    assert f"--share all is the smallest and stores {found[-1].stored_bytes:,}: use a narrower network" in str(caught.value)


def test_fewer_bytes_per_value_fit_a_smaller_budget() -> None:
    smallest = proposed(CHAIN)[0][-1].stored_bytes
    with pytest.raises(ConfigError):
        proposed(CHAIN, budget_bytes=smallest // 2)
    _, chosen = proposed(CHAIN, budget_bytes=smallest // 2, bytes_per_value=1)
    assert chosen is not None


# ---------------------------------------------------------------- ways that are named


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"share": "stage"}, "--share stage"),
        ({"share": "template", "templates": 3}, "--share template --templates 3"),
        ({"groups": ("a.0+b.0", "c.0+d.0")}, "--groups 'a.0+b.0' 'c.0+d.0'"),
        ({"share": "all", "start": "fit"}, "--share all"),
    ],
)
def test_a_way_that_is_named_is_compared_with_sharing_nothing(settings: dict[str, Any], flags: str) -> None:
    found, _ = proposed(dataclasses.replace(CHAIN, **settings))
    assert [proposal.flags for proposal in found] == ["--share none", flags]


def test_a_budget_stays_with_the_way_that_is_named() -> None:
    config = dataclasses.replace(CHAIN, share="template", templates=2)
    (unshared, banks), _ = proposed(config)
    _, chosen = proposed(config, budget_bytes=unshared.stored_bytes - 1)
    assert chosen == banks
    with pytest.raises(ConfigError, match="--share template --templates 2 is the smallest"):
        proposed(config, budget_bytes=banks.stored_bytes - 1)


def test_a_tiled_network_of_the_zoo_may_name_its_tile() -> None:
    found, _ = proposed(NetworkConfig("dacnn14", width=8, share="repeat", base_width=4))
    assert [proposal.flags for proposal in found] == ["--share none", "--share repeat --base-width 4"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (NetworkConfig("dacnn14", templates=2), "network.templates is 2, but network.share is"),
        (NetworkConfig(f"{FILE}:chain", templates=2), "network.templates is 2, but network.share is 'none'"),
        (NetworkConfig(f"{FILE}:chain", width=2), "it changes networks of the zoo"),
        (NetworkConfig(f"{FILE}:chain", share="repeat"), "only networks of the zoo can tile"),
        (NetworkConfig(f"{FILE}:anchored"), "shares by anchors already: leave it out"),
        (NetworkConfig(f"{FILE}:absent"), "has no function 'absent'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: NetworkConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        proposed(config)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("100kB", 100_000),
        ("100KB", 100_000),
        ("100k", 100_000),
        ("64KiB", 65_536),
        ("64 kib", 65_536),
        ("1.5 MB", 1_500_000),
        ("1.5MiB", 1_572_864),
        ("2GB", 2 * 10**9),
        ("0.5GiB", 2**29),
        ("20000", 20_000),
        ("20000 B", 20_000),
        (" 7b ", 7),
        ("1.001kB", 1_001),
        ("0.29 kB", 290),
        ("1.9999B", 1),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kB",
        "-5kB",
        "0",
        "0.0MB",
        "0.5",
        "1e5",
        "5 TB",
        "10 ib",
        "1,000",
        "5kBB",
        "nan",
        "inf",
        "٣kB",
        "9" * 5000,
        "1.",
        "5 k B",
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a size such as 100kB, 64KiB or 1.5MB"):
        parse_bytes(text)
