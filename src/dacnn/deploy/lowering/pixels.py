"""Features as images of one pixel: linear layers whose outputs go back to images become 1x1 convolutions.

A squeeze-and-excitation that is written with linear layers goes from N x C x 1 x 1 to N x C and back, and a regulator behind a
linear layer from N x C to N x C x 1 x 1 and back. A Program has no step that goes back, and needs none: all that led there is
done on N x C x 1 x 1.
"""

from collections.abc import Sequence

from dacnn.deploy.lowering.drafts import Draft, Unflatten, renamed, taken
from dacnn.deploy.lowering.translation import Translation
from dacnn.deploy.program import Convolve, Flatten, Linear

# N images, C channels, H rows, W columns, O output channels, I input channels


def as_pixels(steps: Sequence[Draft], result: str, to: Translation) -> tuple[list[Draft], str]:
    """Do without `Unflatten`.

    Args:
        steps: Each behind those that it takes from.
        result: Name of the value that is read at the end.
        to: Where the steps come from; kernels of linear layers that become convolutions get two dimensions of one pixel.

    Returns:
        The steps, and the name of the result.

    Raises:
        DeployError: What shall become an image of one pixel follows from larger images, or a kernel is read in both ways.
    """
    turned = _turned(steps, to)
    if not turned:
        return list(steps), result
    names: dict[str, str] = {}
    flat: dict[str, str] = {}
    done: list[Draft] = []

    def flattened(name: str) -> str:
        if name not in flat:
            flat[name] = f"{name}.flat"
            done.append(Flatten(flat[name], names.get(name, name)))
        return flat[name]

    for step in steps:
        if isinstance(step, Unflatten) or (isinstance(step, Flatten) and step.out in turned):
            names[step.out] = names.get(step.x, step.x)
        elif isinstance(step, Linear) and step.out in turned:
            done.append(Convolve(step.out, names.get(step.x, step.x), step.kernel))
        else:
            # who wants N x C of it gets that
            wanted = {} if step.out in turned else {name: flattened(name) for name in taken(step) if name in turned}
            done.append(renamed(step, names | wanted))
    _give_pixels([step for step in steps if isinstance(step, Linear)], turned, to)
    return done, flattened(result) if result in turned else names.get(result, result)


def _turned(steps: Sequence[Draft], to: Translation) -> set[str]:
    """Names of the values N x C that become N x C x 1 x 1."""
    made = {step.out: step for step in steps}
    turned: set[str] = set()
    for wanted in steps:
        if not isinstance(wanted, Unflatten):
            continue
        waiting = [wanted.x]
        while waiting:
            step = made[waiting.pop()]
            if step.out in turned:
                continue
            turned.add(step.out)
            if isinstance(step, Flatten):
                if to.shapes[step.x][2:] != (1, 1):
                    raise to.refuse(wanted.node, "features of whole images become pixels: expected features of pooled images")
            else:
                waiting += taken(step)
    return turned


def _give_pixels(linear: Sequence[Linear], turned: set[str], to: Translation) -> None:
    """Make the kernels of linear layers, (O, I), those of 1x1 convolutions, (O, I, 1, 1)."""
    tensors = to.kernels.tensors
    changed = {str(step.kernel.tensor) for step in linear if step.out in turned}
    for step in linear:
        name = str(step.kernel.tensor)
        if name in changed and step.out not in turned:
            raise to.refuse(
                to.graph.logits, f"kernel '{name}' is read by linear layers on features and on pixels: share it less"
            )
    for name in changed:
        tensors[name] = tensors[name].reshape(*tensors[name].shape, 1, 1)
