"""What is said of a column of which no value is known: wrong data trains and predicts without an error."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from .categorical import Categorical
from .hashed import Hashed, paddings_of
from .lists import lists_of
from .scalars import own_scalar, shown
from .tables import Array, cells_of, is_missing

EXAMPLES = 3
LOOKED_AT = 1000
"""Values among which examples are looked for."""


def said_of_unknown(column: Categorical | Hashed, raw: Any, owner: Categorical | Hashed) -> str:
    """A sentence with some of the column's values and some that are known."""
    where = f"column {column.name!r}"
    pads = paddings_of(column.padding, are_hashed=isinstance(owner, Hashed))
    cells = cells_of(where, raw) if column.pooling is None else lists_of(where, raw, pads).cells
    values: Array = cells.values
    if cells.codes is not None:
        values = values[np.unique(cells.codes[cells.codes >= 0])]
    elif cells.missing is not None:
        values = values[~cells.missing]
    got = [own_scalar(value) for value in values[:LOOKED_AT] if not is_missing(value)]
    if column.pooling is None:
        meaning = "every row gets the embedding of the unknown value"
    else:
        meaning = "every value gets the embedding of the unknown value" if got else "every row is pooled to zeros"
    if not got:
        return f"expected values, got none: all of them are missing; {meaning}"
    return f"expected values that it knows, {_known(owner)}, got none, but {_few(dict.fromkeys(got))}; {meaning}"


def _known(owner: Categorical | Hashed) -> str:
    if isinstance(owner, Hashed):
        return "text and whole numbers"
    if owner.size is not None:
        return f"0 to {owner.size - 1}"
    return f"such as {_few(owner.values)}" if owner.values else "of which its vocabulary has none"


def _few(values: Any) -> str:
    return ", ".join(shown(value) for value in islice(values, EXAMPLES))
