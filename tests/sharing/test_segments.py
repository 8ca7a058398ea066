"""What runs again for the gradient gives the bits that kept activations give, and its memory is free when it should be."""

import copy
import dataclasses
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dacnn
from dacnn.errors import TrainingError
from dacnn.networks.network import Network
from dacnn.networks.plan import Stage
from dacnn.sharing.remake import evaluated, remaking
from dacnn.sharing.segments import made_again
from live_bytes import LiveBytes
from reference import one_thread  # noqa: F401  (a fixture)


def randomised(name: str, **changes: object) -> Network:
    """A network of which no parameter is at its start: residual blocks start as the identity, which would hide everything."""
    network = dacnn.create(name, **{"width": 8, "seed": 0} | changes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return network.train()


def images(count: int = 6, seed: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def backward(network: nn.Module, x: Tensor, *, remade: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    """A step up to its gradients; the logits."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16), remaking(remade):
        logits = network(x)
    F.cross_entropy(logits.float(), torch.arange(len(x)) % logits.shape[1]).backward()
    return logits.detach()


def assert_same_bits(network: nn.Module, other: nn.Module) -> None:
    """Equal gradients and buffers."""
    for (name, parameter), (_, expected) in zip(network.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad), name
    for (name, buffer), (_, expected) in zip(network.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def cut(network: Network, blocks_each: int) -> Network:
    """The same network in segments of so many blocks; 0: of all."""
    network = copy.deepcopy(network)
    blocks = sum(len(stage.blocks) for stage in network.plan.stages)
    each = blocks_each or blocks
    network.segments = (each,) * (blocks // each)
    return network


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dacnn14", {}),
        ("dacnn14", {"regulator": "depthwise", "regulator_place": "after-norm"}),
        ("dacnn14-reg", {}),
        ("dacnn18", {"regulator": "low-rank", "regulator_rank": 2}),
        ("dacnn34-mix-reg", {}),
        ("dacnn3", {"depths": (1, 1, 2)}),
    ],
)
def test_a_step_in_segments_has_the_bits_of_a_step_that_keeps_everything(name: str, changes: dict, dtype: torch.dtype) -> None:
    kept = randomised(name, **changes)
    networks = [(cut(kept, each), remade) for each in (1, 2, 0) for remade in (False, True)]
    logits = backward(kept, images(), remade=False, dtype=dtype)
    for network, remade in networks:
        assert torch.equal(backward(network, images(), remade=remade, dtype=dtype), logits)
        assert_same_bits(network, kept)
        assert network.stem.norm.num_batches_tracked == 1


def test_blocks_behind_the_last_segment_are_kept_and_the_bits_are_the_same() -> None:
    kept, network = randomised("dacnn18"), randomised("dacnn18")
    network.segments = (2, 1)
    assert torch.equal(backward(network, images()), backward(kept, images(), remade=False))
    assert_same_bits(network, kept)


def test_poolings_of_stages_without_blocks_stay_where_they_are() -> None:
    plan = dacnn.create("dacnn18", width=8).plan
    empty = Stage(())
    first, second, third, _ = plan.stages
    plan = dataclasses.replace(plan, stages=(empty, first, empty, second, third))
    kept, network = dacnn.create(plan, seed=0), dacnn.create(plan, seed=0)
    network.segments = (1, 1, 3)
    assert kept(images()).isfinite().all()
    kept.load_state_dict(network.state_dict())
    assert torch.equal(backward(network, images()), backward(kept, images(), remade=False))
    assert_same_bits(network, kept)


def test_accumulated_gradients_are_the_same_whether_passes_follow_or_enclose_one_another() -> None:
    kept = randomised("dacnn18")
    network, nested = cut(kept, 2), cut(kept, 2)
    for seed in (3, 4):
        backward(kept, images(seed=seed), remade=False)
        backward(network, images(seed=seed))
    assert_same_bits(network, kept)
    kept.zero_grad()
    plain = copy.deepcopy(kept)
    nested.load_state_dict(kept.state_dict())
    for model in (nested, plain):
        with remaking(model is nested):
            losses = [model(images(seed=seed)).square().sum() for seed in (3, 4)]
        (losses[0] + losses[1]).backward()
    assert_same_bits(nested, plain)


def test_a_shared_kernels_gradient_is_added_up_in_the_order_of_the_plain_loop_and_once() -> None:
    # in float32 the sum of these depends on their order
    factors = [1e8, 3.0, -1e8, 0.7, 5e7, -2.0]
    kernel, plain = (nn.Parameter(torch.ones(4)) for _ in range(2))
    calls: list[Tensor] = []
    kernel.register_post_accumulate_grad_hook(calls.append)
    x, y = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    for first, second in zip(factors[::2], factors[1::2], strict=True):
        x = made_again(lambda x, a=first, b=second: x + (a * kernel).sin() + (b * kernel).sin(), x)
        y = y + (first * plain).sin() + (second * plain).sin()
    x.sum().backward()
    y.sum().backward()
    assert torch.equal(kernel.grad, plain.grad)
    assert len(calls) == 1


def test_dropout_drops_the_same_and_the_generator_ends_where_it_would() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8))
    plain = copy.deepcopy(module)
    x = torch.randn(5, 8)
    after = []
    for model in (module, plain):
        torch.manual_seed(0)
        z = made_again(model, x, [model]) if model is module else model(x)
        torch.rand(3)  # numbers that somebody else draws in between
        z.square().sum().backward()
        after.append(torch.rand(3))
    assert_same_bits(module, plain)
    assert torch.equal(*after)


def test_buffers_that_a_forward_pass_reads_and_writes_are_as_they_were_in_the_second_run() -> None:
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    plain = copy.deepcopy(module)
    x = torch.randn(5, 8)
    made_again(module, x, [module]).square().sum().backward()
    plain(x).square().sum().backward()
    assert_same_bits(module, plain)


def test_what_goes_into_a_segment_may_be_a_parameter_or_a_view_of_one() -> None:
    for view in (False, True):
        kept, parameter = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
        made_again(lambda x: (x * x).sin() * x, parameter.t() if view else parameter).sum().backward()
        x = kept.t() if view else kept
        ((x * x).sin() * x).sum().backward()
        assert torch.equal(parameter.grad, kept.grad)


def test_a_segment_within_a_segment_has_the_same_bits() -> None:
    inner = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(3)]
    module = nn.Sequential(*inner)
    plain = copy.deepcopy(module)

    def outer(x: Tensor) -> Tensor:
        for part in inner:
            x = made_again(part, x, [part])
        return x

    x = torch.randn(5, 8)
    made_again(outer, x, inner).square().sum().backward()
    plain(x).square().sum().backward()
    assert_same_bits(module, plain)


def test_a_graph_that_is_retained_gives_its_gradients_twice_and_then_says_so() -> None:
    kept = randomised("dacnn18")
    network = cut(kept, 2)
    for model in (kept, network):
        with remaking(model is network):
            loss = model(images()).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert_same_bits(network, kept)


TWO_PROCESSES = """
import copy, os, torch, torch.nn.functional as F, dacnn
from torch.nn.parallel import DistributedDataParallel
from dacnn.sharing.remake import remaking
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
kept = dacnn.create("dacnn18", width=8, seed=0).train()
for block in kept.modules():
    if isinstance(block, torch.nn.BatchNorm2d):
        torch.nn.init.constant_(block.weight, 0.7)
cut = copy.deepcopy(kept)
cut.segments = (1, 2, 3)
x = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(rank))
for network in (kept, cut):
    model = DistributedDataParallel(network)
    for index, batch in enumerate(x):
        with model.no_sync() if index == 0 else torch.enable_grad(), remaking(network is cut):
            F.cross_entropy(model(batch), torch.arange(4)).backward()
for kind in ("named_parameters", "named_buffers"):
    for (name, one), (_, other) in zip(getattr(kept, kind)(), getattr(cut, kind)()):
        one, other = (one.grad, other.grad) if kind == "named_parameters" else (one, other)
        assert torch.equal(one, other), name
# what is left to do at the end of a process, and in which order, is no claim of this test
torch.distributed.barrier()
os._exit(0)
"""


def test_two_processes_that_accumulate_have_the_same_bits(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- memory


def kept_bytes(network: Network, x: Tensor, remade: bool) -> int:
    """What a forward pass leaves for its gradients."""
    with LiveBytes(x, *network.state_dict().values()) as live, remaking(remade):
        logits = network(x)
    kept = live.now
    del logits
    gc.collect()
    assert live.now == 0, "a graph that nobody wants is freed, with what its segments keep"
    return kept


@pytest.mark.parametrize("name", ["dacnn18", "dacnn14", "dacnn14-reg"])
def test_segments_keep_their_inputs_alone(name: str) -> None:
    network = randomised(name)
    x = torch.randn(8, 3, 32, 32)
    whole, remade = kept_bytes(network, x, False), kept_bytes(network, x, True)
    one, every = kept_bytes(cut(network, 0), x, True), kept_bytes(cut(network, 1), x, True)
    assert one < 0.05 * whole
    assert one < every < remade < whole
    # the inputs of all blocks but the first, whose segment begins with the image
    plan, pixels, inputs = network.plan, 32 * 32, 0
    for stage in plan.stages:
        inputs += len(stage.blocks) * pixels
        pixels //= 4 if stage.pool else 1
    inputs -= 32 * 32
    # logits, statistics and other small things apart
    assert every - one == pytest.approx(inputs * 8 * 8 * 4, rel=0.05)


def test_behind_the_gradient_only_gradients_are_left() -> None:
    network = cut(randomised("dacnn18"), 2)
    x = torch.randn(8, 3, 32, 32)
    with LiveBytes(x, *network.state_dict().values()) as live, remaking():
        loss = network(x).square().sum()
        loss.backward()
    gc.collect()
    gradients = sum(parameter.grad.untyped_storage().nbytes() for parameter in network.parameters())
    # the loss still stands, and with it the nodes of its graph
    assert live.now <= gradients + 64


def test_the_peak_of_a_deep_network_is_far_lower() -> None:
    network = randomised("dacnn18", depths=(8, 8))
    x = torch.randn(4, 3, 32, 32)
    peaks = []
    for model, remade in [(network, False), (cut(network, 2), False), (cut(network, 2), True)]:
        with LiveBytes(x, *model.state_dict().values()) as live:
            backward(model, x, remade=remade)
        peaks.append(live.peak)
    assert peaks[1] < 0.5 * peaks[0] and peaks[2] < 0.9 * peaks[1]


# ---------------------------------------------------------------- where it does nothing, and what goes wrong


def counting(calls: list[int]) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        calls.append(len(calls))
        return (x * 2).sin()

    return function


def test_without_gradients_a_segment_is_just_run() -> None:
    calls: list[int] = []
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        made_again(counting(calls), x)
    assert len(calls) == 1
    made_again(counting(calls), x).sum().backward()
    assert len(calls) == 3


def test_a_compiler_and_an_exporter_see_a_plain_network() -> None:
    network = cut(randomised("dacnn3"), 1)
    plain = copy.deepcopy(network)
    plain.segments = ()
    x = torch.randn(2, 3, 32, 32)
    names = [[node.target for node in torch.export.export(model, (x,)).graph.nodes] for model in (network, plain)]
    assert names[0] == names[1]
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), plain(x))


def test_a_step_runs_on_tensors_without_memory() -> None:
    with FakeTensorMode():
        network = dacnn.create("dacnn18", width=8)
        network.segments = (1, 2)
        with remaking():
            loss = network(torch.zeros(4, 3, 32, 32)).sum()
        loss.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


def test_copies_keep_the_segments_and_files_do_not_have_them() -> None:
    network = dacnn.create("dacnn18", width=8)
    assert network.segments == ()
    keys = network.state_dict().keys()
    network.segments = (1, 2)
    assert copy.deepcopy(network).segments == (1, 2)
    assert network.state_dict().keys() == keys


class Failing(nn.Module):
    """Fails in a given run."""

    def __init__(self, run: int) -> None:
        super().__init__()
        self.norm, self.run, self.runs = nn.BatchNorm1d(4), run, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        y = F.dropout(self.norm(x))
        if self.runs == self.run:
            raise ValueError("something went wrong")
        return y.sin()


@pytest.mark.parametrize("run", [1, 2])
def test_an_exception_in_either_run_leaves_everything_as_it_was(run: int) -> None:
    module = Failing(run)
    buffers = dict(module.named_buffers())
    x = torch.randn(6, 4, requires_grad=True)
    with remaking(), pytest.raises(ValueError, match="something went wrong"):
        y = made_again(module, x, [module]).sum()
        states = torch.get_rng_state(), {name: buffer.clone() for name, buffer in buffers.items()}
        y.backward()
    if run == 2:
        assert torch.equal(torch.get_rng_state(), states[0])
        assert all(torch.equal(buffer, states[1][name]) for name, buffer in buffers.items())
    assert all(buffer is buffers[name] for name, buffer in module.named_buffers())
    assert torch.is_grad_enabled()
    # nothing of the segment's hooks is left behind
    z = (x * 2).sin()
    z.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("what", ["parameter", "input"])
def test_what_was_changed_before_the_gradient_was_taken_is_refused(what: str) -> None:
    linear = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    y = made_again(lambda x: linear(x).sin(), x).sum() if what == "input" else made_again(linear, x.requires_grad_()).sum()
    with torch.no_grad():
        (x if what == "input" else linear.weight).add_(1)
    with pytest.raises(TrainingError, match="changed in place behind the forward pass: call backward"):
        y.backward()


def test_a_segment_that_does_something_else_the_second_time_is_refused() -> None:
    runs: list[int] = []

    def fickle(x: Tensor) -> Tensor:
        runs.append(1)
        return x.sin().cos() if len(runs) == 1 else x.sin()

    def growing(x: Tensor) -> Tensor:
        runs.append(1)
        return x.repeat(len(runs)).sin()

    for function, words in [
        (fickle, "saved 2 tensors, and 1 when it ran again"),
        (growing, r"shape \(3,\), and \(6,\) in its"),
    ]:
        runs.clear()
        with pytest.raises(TrainingError, match=words):
            made_again(function, torch.ones(3, requires_grad=True)).sum().backward()


# ---------------------------------------------------------------- kernels that follow from stored ones


def combined(coefficients: Tensor, templates: Tensor) -> Tensor:
    """A combination of the templates of a bank."""
    return torch.tensordot(coefficients, templates, dims=1)


def tiled(coefficients: Tensor, templates: Tensor) -> Tensor:
    """Tiles, each through a curve of its own; its gradient needs several tensors of the kernel's size."""
    rows = [
        factor * template / (1 + torch.exp(factor * template)) for factor, template in zip(coefficients, templates, strict=True)
    ]
    return torch.cat(rows).view(len(templates), *templates.shape[1:]).sum(0)


class Expressions(nn.Module):
    """Convolutions whose kernels follow from one stored tensor."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], readers: int) -> None:
        super().__init__()
        self.function = function
        self.templates = nn.Parameter(torch.randn(3, 16, 16, 3, 3) * 0.1)
        self.coefficients = nn.ParameterList([torch.randn(3) for _ in range(readers)])

    def kernel(self, number: int) -> Tensor:
        return evaluated(self.function, self.coefficients[number], self.templates)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(len(self.coefficients)):
            # each kernel has two readers
            kernel = self.kernel(number)
            x = F.conv2d(F.conv2d(x, kernel, padding=1).tanh(), kernel, padding=1).tanh()
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("function", [combined, tiled])
def test_kernels_that_are_evaluated_again_give_the_same_bits_and_are_not_kept(
    function: Callable[[Tensor, Tensor], Tensor], segments: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    kept = Expressions(function, readers=4)
    network = copy.deepcopy(kept)
    x = torch.randn(1, 16, 2, 2)
    left = []
    for model in (kept, network):
        with LiveBytes(x, *model.parameters()) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), remaking(model is network):
                y = made_again(model, x, [model]) if segments and model is network else model(x)
            gc.collect()
            left.append(live.now)
            y.float().square().sum().backward()
    assert_same_bits(network, kept)
    kernel_bytes = 16 * 16 * 9 * dtype.itemsize
    assert left[0] > 4 * kernel_bytes
    # activations are small here: not even one kernel would fit
    assert left[1] < kernel_bytes


def test_an_evaluated_kernel_is_rounded_once_to_what_its_reader_takes() -> None:
    network = Expressions(combined, readers=1)
    expected = combined(network.coefficients[0], network.templates)
    assert torch.equal(network.kernel(0), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.kernel(0), expected.bfloat16())
