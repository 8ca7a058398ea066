"""Tables of C whose columns are as narrow as their numbers: what stands once a layer shall be small."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from dacnn.errors import DeployError

# of all that C promotes to int; wider ones would make differences unsigned
_TYPES = (("uint8_t", 0, 2**8 - 1), ("int8_t", -(2**7), 2**7 - 1), ("uint16_t", 0, 2**16 - 1), ("int16_t", -(2**15), 2**15 - 1))
_WIDEST = ("int32_t", -(2**31), 2**31 - 1)
_BYTES = {"uint8_t": 1, "int8_t": 1, "uint16_t": 2, "int16_t": 2, "int32_t": 4}
_POINTER_BYTES = 8
# a cell: a number, or the name of an array
Cell = int | str


@dataclass(frozen=True)
class Table:
    """A table as the template writes it.

    Attributes:
        type: Of a row, without the network's name.
        name: Of the array of rows.
        about: A comment; may be empty.
        fields: Types and the names of their columns, the widest first, so that nothing lies unused between them.
        rows: The cells.
    """

    type: str
    name: str
    about: str
    fields: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]


def table(
    type: str,
    name: str,
    rows: Iterable[Mapping[str, Cell]],
    pointers: Mapping[str, str] | None = None,
    signed: Iterable[str] = (),
    about: str = "",
) -> Table:
    """Lay out a table.

    Args:
        type: Of a row, without the network's name.
        name: Of the array.
        rows: Their cells by column, one row or more.
        pointers: Types of the columns that hold names of arrays.
        signed: Columns that may be -1, whether they are or not.
        about: A comment.

    Returns:
        The table.

    Raises:
        DeployError: A number needs more than 32 bits.
    """
    listed, pointers, minus = list(rows), pointers or {}, set(signed)
    types = {
        column: pointers.get(column) or _narrowest(column, [*(-1 for _ in minus & {column}), *(row[column] for row in listed)])
        for column in listed[0]
    }
    # sorting keeps the order of columns of one type
    columns = sorted(types, key=lambda column: (-_BYTES.get(types[column], _POINTER_BYTES), types[column]))
    declared = []
    for kind, group in groupby(columns, key=types.__getitem__):
        words = list(group)
        declared.append((kind, (", *" if kind.endswith("*") else ", ").join(words)))
    return Table(type, name, about, tuple(declared), tuple(tuple(row[column] for column in columns) for row in listed))


def _narrowest(column: str, cells: Iterable[Cell]) -> str:
    numbers = [cell for cell in cells if isinstance(cell, int)]
    for kind, low, high in (*_TYPES, _WIDEST):
        if low <= min(numbers) and max(numbers) <= high:
            return kind
    raise DeployError(f"a number of the column '{column}' needs more than 32 bits: the network is too large for its C code")
