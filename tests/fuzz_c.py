"""Random plans as C, under address and undefined-behaviour sanitizers, against the interpreters.

    python tests/fuzz_c.py --count 1000
    python tests/fuzz_c.py --count 1000 --dtype bfloat16
    python tests/fuzz_c.py --count 1000 --dtype int8

prints what it has done, and for a finding the plan and the seed that make it again.
"""

import argparse
import dataclasses
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar, get_args

import hypothesis
import hypothesis.strategies as st
import torch

from c_networks import SANITIZED, check, check_int8, integers_of
from dacnn.deploy.c.files import Dtype
from dacnn.deploy.c.source import Winograd
from dacnn.deploy.lower import lower
from dacnn.deploy.program import Program
from dacnn.errors import PlanError
from dacnn.networks.network import Network
from dacnn.networks.plan import Layer, Plan
from reference import plans, randomise

T = TypeVar("T")
R = TypeVar("R")

# programs of one executable
BATCH = 5
_AT_LEAST = 50
COMPILERS = ("gcc", "clang")


def widened(plan: Plan, factor: int) -> Plan:
    """The plan with every width times a factor, where the stem's kernel permits."""

    def layer(of: Layer) -> Layer:
        inputs = of.in_channels if of.name == plan.stem.name else of.in_channels * factor
        return dataclasses.replace(of, in_channels=inputs, out_channels=of.out_channels * factor)

    stages = [
        dataclasses.replace(
            stage,
            blocks=tuple(
                dataclasses.replace(
                    block,
                    layers=tuple(map(layer, block.layers)),
                    shortcut=layer(block.shortcut) if block.shortcut else None,
                )
                for block in stage.blocks
            ),
        )
        for stage in plan.stages
    ]
    try:
        return dataclasses.replace(plan, stem=layer(plan.stem), stages=tuple(stages))
    except PlanError:
        return plan


def drawn(count: int, seed: int) -> list[tuple[Plan, int]]:
    """Plans, and the seeds of their weights, all different; the same ones for the same seed."""
    found: dict[tuple[Plan, int], None] = {}
    while len(found) < count:
        # some are drawn twice; another seed draws more, a good many, for the first ones are the simplest everywhere
        found |= dict.fromkeys(_drawn(max(count - len(found), _AT_LEAST if found else 0), seed + 1_000_003 * len(found)))
    return list(found)[:count]


def _drawn(count: int, seed: int) -> list[tuple[Plan, int]]:
    found: list[tuple[Plan, int]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(plan=plans(), factor=st.sampled_from([1, 5, 8, 9]), weights=st.integers(0, 999))
    def draw(plan: Plan, factor: int, weights: int) -> None:
        found.append((widened(plan, factor), weights))

    draw()
    return found


def program(plan: Plan, weights: int) -> Program:
    return lower(randomise(Network(plan, torch.Generator().manual_seed(weights)), weights).eval())


def tasks(count: int, seed: int, turn: int = 0) -> Iterator[tuple[dict[str, Program], str, Winograd]]:
    """Programs of one executable, by what makes each again, the compiler, and where transformed kernels are, in turn."""
    found = drawn(count, seed)
    for number in range(-(-len(found) // BATCH)):
        batch = found[number * BATCH : (number + 1) * BATCH]
        programs = {f"{plan.to_json()}, weights {weights}": program(plan, weights) for plan, weights in batch}
        kinds, turn = get_args(Winograd), turn + 1
        yield programs, COMPILERS[turn % len(COMPILERS)], kinds[turn // len(COMPILERS) % len(kinds)]


def in_turn(pool: Executor, call: Callable[[T], R], tasks: Iterable[T], ahead: int) -> Iterator[R]:
    """Results in the order of the tasks, of which so many are begun ahead: drawn later, they take no memory yet."""
    waiting: deque[Future[R]] = deque()
    for task in tasks:
        waiting.append(pool.submit(call, task))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    for one in waiting:
        yield one.result()


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="plans")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32")
    of = parser.parse_args(words)
    torch.set_num_threads(1)
    began, findings, done = time.monotonic(), 0, 0

    def one(task: tuple[dict[str, Program], str, Winograd]) -> tuple[int, str]:
        programs, cc, winograd = task
        try:
            if of.dtype == "int8":
                check_int8({name: integers_of(one) for name, one in programs.items()}, cc)
            else:
                check(programs, cc, SANITIZED, winograd, dtype=of.dtype)
        except AssertionError as finding:
            return len(programs), f"{cc}, winograd {winograd}: {finding}"
        return len(programs), ""

    with ThreadPoolExecutor(of.jobs) as pool:
        for number, said in in_turn(pool, one, tasks(of.count, of.seed), of.jobs):
            done += number
            findings += bool(said)
            if said:
                print(said, flush=True)
            print(f"\r{done} plans, {findings} findings, {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)
    print(f"\n{done} plans, {findings} findings, {time.monotonic() - began:.0f} s")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
