"""How many copies of each kernel an artefact holds, where they are, and what made them."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dacnn.checkpoint import weights_path
from dacnn.errors import ArtefactError
from dacnn.measure.artefacts import format_of, read_artefact, read_bytes
from dacnn.measure.copies import Difference, Group, group_copies
from dacnn.measure.hazards import HAZARDS, Hazard, hazard_of
from dacnn.measure.search import KernelSearch
from dacnn.measure.stored import Artefact, StoredArray, is_trivial


@dataclass(frozen=True)
class Copy:
    """One array that holds a kernel.

    Attributes:
        names: Every name of it; names of the same bytes are one copy.
        place: What it is in the artefact: `tensor`, `parameter`, `initialiser`, `Constant node`, ...
        shape: Its shape as stored.
        dtype: Its type as stored.
        nbytes: Bytes that it takes.
        difference: How it differs from the kernel: `exact`, `scaled per output channel`, `transposed`, `blocked by 16`, ...
        layout: The order in which it was recognised, where that is not the usual one.
        readers: How many layers read it, where the artefact tells.
    """

    names: tuple[str, ...]
    place: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    difference: tuple[str, ...]
    layout: str
    readers: int | None


@dataclass(frozen=True)
class Kernel:
    """One kernel and every array that holds it.

    Attributes:
        name: Its name in the reference, or that of its first copy.
        copies: The arrays; the first one is the one that would do.
        hazard: What made it many, or wrong; None where it is single.
        altered: Whether it is the reference's kernel scaled although several layers may read it, so that outputs are wrong.
    """

    name: str
    copies: tuple[Copy, ...]
    hazard: str | None
    altered: bool

    @property
    def wasted_bytes(self) -> int:
        """Bytes of all copies but the first."""
        return sum(copy.nbytes for copy in self.copies[1:])


@dataclass(frozen=True)
class Audit:
    """What an artefact stores.

    Attributes:
        artefact: Its path, or the class of a module.
        format: `safetensors`, `pt`, `pt2`, `onnx` or `module`; `bytes` where nothing but the bytes is known.
        kernels: Every kernel, in the order of the artefact; of `bytes`, in that of the reference.
        missing: Kernels of the reference that the artefact does not hold.
        unsearched: Of `bytes`, kernels of the reference that cannot be told from other bytes, since they hold hardly two signs:
            nothing is said of them.
    """

    artefact: str
    format: str
    kernels: tuple[Kernel, ...]
    missing: tuple[str, ...]
    unsearched: tuple[str, ...] = ()

    @property
    def single(self) -> bool:
        """Whether each kernel is there once, and as the reference has it."""
        return not self.missing and not any(len(kernel.copies) > 1 or kernel.altered for kernel in self.kernels)

    @property
    def wasted_bytes(self) -> int:
        """Bytes of all copies but one of each kernel."""
        return sum(kernel.wasted_bytes for kernel in self.kernels)

    @property
    def kernel_bytes(self) -> int:
        """Bytes of all kernels with all their copies."""
        return sum(copy.nbytes for kernel in self.kernels for copy in kernel.copies)

    @property
    def hazards(self) -> tuple[Hazard, ...]:
        """What made the copies, each once."""
        return tuple(HAZARDS[name] for name in dict.fromkeys(kernel.hazard for kernel in self.kernels) if name)

    def to_table(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "artefact": self.artefact,
            "format": self.format,
            "single": self.single,
            "kernel_bytes": self.kernel_bytes,
            "wasted_bytes": self.wasted_bytes,
            "kernels": [
                {
                    "name": kernel.name,
                    "count": len(kernel.copies),
                    "wasted_bytes": kernel.wasted_bytes,
                    "altered": kernel.altered,
                    "hazard": kernel.hazard,
                    "copies": [asdict(copy) for copy in kernel.copies],
                }
                for kernel in self.kernels
            ],
            "missing": list(self.missing),
            "unsearched": list(self.unsearched),
            "hazards": [asdict(hazard) for hazard in self.hazards],
        }


def _copy(array: StoredArray, difference: Difference, layout: str) -> Copy:
    shape = tuple(int(size) for size in array.values.shape)
    return Copy(array.names, array.place, shape, array.dtype, array.nbytes, difference.words, layout, array.readers)


def _kernel(artefact: Artefact, members: list[tuple[StoredArray, Difference]], reference: StoredArray | None) -> Kernel:
    """A kernel from the arrays that hold it, the first one being the one that would do."""
    layouts = [difference.kernel_layout for _, difference in members[1:]]
    copies = [_copy(array, difference, difference.layout) for array, difference in members]
    if reference is None:
        # it differs from itself in nothing; its layout is the one in which the others were found to be like it
        copies[0] = _copy(members[0][0], Difference(), next(filter(None, layouts), ""))
    readers = {members[0][0].readers, reference.readers if reference else None}
    scaled = any(word.startswith("scaled") for word in copies[0].difference)
    # integers are always scaled: by what one of them stands for
    scaled = scaled and "int" not in copies[0].dtype
    altered = reference is not None and len(copies) == 1 and scaled and 1 not in readers
    hazard = None
    if altered:
        hazard = HAZARDS["fused-in-turn"].name
    elif len(copies) > 1:
        words = {word for copy in copies for word in copy.difference}
        hazard = hazard_of(artefact.format, artefact.writer, words).name
    return Kernel(reference.name if reference else copies[0].names[0], tuple(copies), hazard, altered)


def _kernels(
    artefact: Artefact, references: tuple[StoredArray, ...], groups: Iterable[Group]
) -> tuple[list[Kernel], list[str]]:
    """The kernels that the artefact holds, and the names of those that only the reference has."""
    arrays = (*references, *artefact.arrays)
    kernels, missing = [], []
    for group in groups:
        reference = arrays[group.first] if group.first < len(references) else None
        pairs = [(group.first, Difference()), *group.others]
        members = [(arrays[index], difference) for index, difference in pairs if index >= len(references)]
        if members:
            kernels.append(_kernel(artefact, members, reference))
        elif reference is not None and not is_trivial(reference.values):
            missing.append(reference.name)
    return kernels, missing


def _searched(path: Path, references: tuple[StoredArray, ...]) -> tuple[Artefact, list[Group]]:
    """A file of any kind by the reference's kernels that are found in its bytes; those that cannot be told have no group."""
    search = KernelSearch(references)
    if not search.looked_for:
        raise ArtefactError(f"{path}: no kernel of the reference can be told from other bytes: expected one that was trained")
    found = search.find(read_bytes(path))
    groups = [
        Group(
            kernel,
            tuple((len(references) + place, copy.difference) for place, copy in enumerate(found) if copy.kernel == kernel),
        )
        for kernel in sorted(search.looked_for)
    ]
    return Artefact(str(path), "bytes", "", tuple(copy.array for copy in found)), groups


def audit(artefact: str | Path | nn.Module, *, against: str | Path | nn.Module | None = None) -> Audit:
    """Find every copy of every kernel that an artefact holds.

    A copy is found although its channels were scaled, its axes transposed, its channels blocked by 8 or 16, or its numbers
    rounded. An array with several names is one copy. Constants and identities are copies of nothing.

    In a file of any other kind, such as a firmware image, a library, a WebAssembly module or another runtime's model, the
    kernels of the reference are searched for among its bytes, in all orders and types that are known.

    Args:
        artefact: A run directory, a `.safetensors`, `.pt`, `.pt2` or `.onnx` file, any other file if there is a reference, or a
            live module. Nothing is unpickled but tensors.
        against: What the artefact was made from, in any of these forms. With it, a kernel that is there once but scaled is
            reported as altered, unless one layer alone reads it, and a kernel that is not there as missing.

    Returns:
        What was found.

    Raises:
        ArtefactError: The artefact or the reference cannot be read.
        CheckpointError: A directory holds no weights.

    Example:
        >>> import copy, dacnn, torch
        >>> network = dacnn.create("dacnn14", width=8)
        >>> dacnn.audit(network).single
        True
        >>> twice = torch.nn.ModuleList([network, copy.deepcopy(network)])
        >>> dacnn.audit(twice).wasted_bytes >= network.anchors["width8"].nbytes
        True
    """
    references = read_artefact(against).arrays if against is not None else ()
    path = None if isinstance(artefact, nn.Module) else weights_path(Path(artefact))
    if path is not None and against is not None and format_of(path) == "bytes":
        # each once, so that a copy is counted for one of them
        references = tuple(references[group.first] for group in group_copies(references))
        examined, groups = _searched(path, references)
    else:
        examined = read_artefact(artefact)
        groups = group_copies((*references, *examined.arrays), len(references))
    grouped = {group.first for group in groups}
    unsearched = (array.name for index, array in enumerate(references) if index not in grouped and not is_trivial(array.values))
    kernels, missing = _kernels(examined, references, groups)
    return Audit(
        examined.label,
        examined.format,
        tuple(kernels),
        tuple(missing),
        tuple(unsearched) if examined.format == "bytes" else (),
    )
