"""The honest control: what an unshared network does that may store as much."""

import bisect
import dataclasses
import itertools

from dacnn.errors import PlanError
from dacnn.measure.count import count
from dacnn.networks.network import Network, as_planned
from dacnn.networks.plan import Layer, Plan


def rival(network: Network | Plan) -> Plan:
    """The equal-bytes rival of a network: the same topology unshared, as wide as its stored parameters allow.

    All channel numbers are scaled by one factor and rounded; the image's channels and the classes stay. The factor is
    the largest, in steps of one channel of the widest layer, with which no more parameters are stored.

    Args:
        network: A network, or the plan of one.

    Returns:
        The plan, without regulators.

    Raises:
        ConfigError: This is no network of a plan.
        PlanError: Even of one channel a layer, the unshared network stores more.

    Example:
        >>> import dacnn
        >>> dacnn.rival(dacnn.create("dacnn14", num_classes=100)).stem.out_channels
        38
    """
    plan = network if isinstance(network, Plan) else as_planned(network).plan
    budget = count(plan).stored_parameters
    twin = plan.unshared()
    widest = max(layer.out_channels for layer in twin.layers())

    def stored(width: int) -> int:
        return count(_scaled(twin, width, widest)).stored_parameters

    # doubled until it is too wide: a network that is mostly regulators stores more than its unshared twin
    beyond = next(top for top in (widest * 2**power for power in itertools.count()) if stored(top) > budget)
    width = bisect.bisect_right(range(1, beyond), budget, key=stored)
    if width == 0:
        raise PlanError(
            f"plan '{plan.name}' stores {budget:,} parameters, its unshared twin of one channel {stored(1):,}: "
            "it has no rival, make it wider"
        )
    return dataclasses.replace(_scaled(twin, width, widest), name=f"{plan.name} rival")


def _scaled(plan: Plan, width: int, widest: int) -> Plan:
    """The plan with all channels times `width` / `widest`, those of the image aside."""

    def channels(number: int) -> int:
        # equal numbers go to equal numbers, so that channels meet as before; half rounds up
        return max(1, (2 * number * width + widest) // (2 * widest))

    def scaled(layer: Layer) -> Layer:
        # what the stem takes is the image
        inputs = layer.in_channels if layer.name == plan.stem.name else channels(layer.in_channels)
        return dataclasses.replace(layer, in_channels=inputs, out_channels=channels(layer.out_channels))

    return plan.mapped(scaled)
