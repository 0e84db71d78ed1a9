"""Embeddings of categorical and numeric columns: everything in front of the trunk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ple_fast_encoder.columns import Column, EmbeddedColumn, owners_of
from ple_fast_encoder.numeric import Numeric

from ..scalars import check_count, check_flag
from .columns import Encoded
from .look_up import look_up
from .pooling import Bag, pooled

if TYPE_CHECKING:
    from typing_extensions import Self

INITIAL_STD = 0.1
"""Of the embeddings. On Census-Income (PLE, one seed) 0.5 cost .003 of the income AUC, and 0.03 changed nothing."""


class FeatureEmbedding(nn.Module):
    """Codes and numbers to one row of features: ``(B, out_features)``, or one per slot of a trunk.

    The embeddings of all columns of one width lie in one table (``tables.{i}.weight``, widths ascending, each column's
    rows behind those of the column before), so that a batch costs one look-up per width and not one per column. A
    column that shares the embedding of another one has no rows of its own.
    The features: embeddings by width and then in the order of the columns, those of one value per row before those that
    are pooled; plain numbers; embedded numbers; in the widest of their dtypes (plain numbers are float32).

    Args:
        columns: at least one.
        sparse: gradients of the tables are COO tensors of the rows that a batch has, as those of
            ``nn.Embedding(sparse=True)``, which each table is.
        slots: S, and every value and embedded number has S embeddings, side by side in its row of a table ``(rows, S
            width)``: a batch is still one look-up per width, and the features are ``(B, S, out_features)``. None: one,
            without an axis.

    Raises:
        TypeError: ``sparse`` is no bool, or ``slots`` no int.
        ValueError: no column, one that shares the embedding of a column that is not there, or no slot.
    """

    def __init__(self, columns: Sequence[Column], *, sparse: bool = False, slots: int | None = None) -> None:
        super().__init__()
        sparse = check_flag("sparse", sparse)
        self.slots = None if slots is None else check_count("slots", slots)
        copies = 1 if self.slots is None else self.slots
        numeric = [column for column in columns if isinstance(column, Numeric)]
        if not columns:
            raise ValueError("columns: expected at least one Categorical, Hashed or Numeric, got none")
        owners = owners_of(columns)
        embedded = [column for column in columns if not isinstance(column, Numeric)]
        widths_of = {column.name: _width(owners[column.name]) for column in embedded}
        # The places of each column in the codes, as encode lays them out.
        ordered = [column for column in embedded if column.pooling is None]
        ordered += [column for column in embedded if column.pooling is not None]
        *begins, self.num_codes = accumulate((column.max_length or 1 for column in ordered), initial=0)
        self.num_numbers = sum(column.features for column in numeric)
        # The user's defaults, as nn.Embedding takes them.
        where: dict[str, Any] = {"device": torch.get_default_device(), "dtype": torch.get_default_dtype()}
        whole = {**where, "dtype": torch.int64}
        self.tables = nn.ModuleList()
        self._picks: list[list[int]] = []
        self._first: list[list[int]] = []
        self._bags: list[list[Bag]] = []
        for group, width in enumerate(sorted(set(widths_of.values()))):
            owning = [column for column in embedded if widths_of[column.name] == width and column.rows]
            *firsts, rows = accumulate((column.rows for column in owning), initial=0)
            first_of = {column.name: first for column, first in zip(owning, firsts, strict=True)}
            pick: list[int] = []
            first: list[int] = []
            bags: list[Bag] = []
            for column, begin in zip(ordered, begins, strict=True):
                if widths_of[column.name] == width:
                    length = column.max_length or 1
                    pick += range(begin, begin + length)
                    first += [first_of[owners[column.name].name]] * length
                    bags += [] if column.pooling is None else [Bag(length, column.pooling)]
            self.tables.append(nn.Embedding(rows, copies * width, sparse=sparse))
            self._picks.append(pick)
            self._first.append(first)
            self._bags.append(bags)
            # Integers, which half() leaves alone; not persistent, because they follow from the columns.
            self.register_buffer(f"first_{group}", torch.tensor(first, **whole), persistent=False)
        widths = [column.width for column in numeric for _ in range(column.features)]
        self._plain = [place for place, width in enumerate(widths) if width is None]
        self._owners = [place for place, width in enumerate(widths) for _ in range(width or 0)]
        self.register_buffer("owner", torch.tensor(self._owners, **whole), persistent=False)
        shape = [len(self._owners)] if self.slots is None else [self.slots, len(self._owners)]
        self.number_weight = nn.Parameter(torch.empty(shape, **where)) if self._owners else None
        self.number_bias = nn.Parameter(torch.empty(shape, **where)) if self._owners else None
        by_width = sorted(ordered, key=lambda column: widths_of[column.name])  # stable
        numbers = [column.name for column in numeric for _ in range(column.features)]
        self.feature_columns = (
            *(column.name for column in by_width for _ in range(widths_of[column.name])),
            *(numbers[place] for place in (*self._plain, *self._owners)),
        )
        """Of each feature the name of its column."""
        self.out_features = len(self.feature_columns)
        self.register_load_state_dict_post_hook(_follow)  # type: ignore[no-untyped-call]  # untyped in torch
        self.reset_parameters()

    @property
    def sparse(self) -> bool:
        """Whether gradients of the tables are sparse; may be set, also to go on training with the other kind."""
        return any(getattr(table, "sparse", False) for table in self.tables)  # which DistributedDataParallel reads, too

    @sparse.setter
    def sparse(self, value: bool) -> None:
        for table in self.tables:
            assert isinstance(table, nn.Embedding)
            table.sparse = check_flag("sparse", value)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What forward computes, but for the weights and the kind of their gradients: equal where two compute alike."""
        sizes = ("num_embeddings", "embedding_dim")
        tables = [[getattr(table, name, None) for name in sizes] for table in self.tables]
        places = (self._picks, self._first, self._bags, self._plain, self._owners)
        return tables, self.slots, self.num_codes, self.num_numbers, self.feature_columns, *places

    @property
    def look_ups(self) -> list[int]:
        """Of each table how many of its rows one row of a batch reads, at most."""
        return [len(pick) for pick in self._picks]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal embeddings, zeros for unknown values; numbers as ``nn.Linear`` with one input."""
        for table, first in zip(self.tables, self._first, strict=True):
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=INITIAL_STD)
            table.weight[first] = 0.0
        self._set_indices(self.get_buffer("owner").device)
        for parameter in (self.number_weight, self.number_bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -1.0, 1.0)

    def _set_indices(self, device: torch.device) -> None:
        """Make anew what follows from the columns, and is in no state dict."""
        with torch.inference_mode(False):
            for group, first in enumerate(self._first):
                self._buffers[f"first_{group}"] = torch.tensor(first, device=device, dtype=torch.int64)
            self._buffers["owner"] = torch.tensor(self._owners, device=device, dtype=torch.int64)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """As in PyTorch; after ``to_empty`` nobody else would write the indices."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        self._set_indices(self.get_buffer("owner").device)
        return self

    def forward(self, rows: Encoded) -> Tensor:
        """``rows``: codes ``(B, C)`` and numbers ``(B, N)``, see :class:`Encoded`. Returns ``(B, out_features)``,
        or ``(B, slots, out_features)``.

        Raises:
            ValueError: codes or numbers of another width.
        """
        codes, numbers = rows
        for name, given, width in (("codes", codes, self.num_codes), ("numbers", numbers, self.num_numbers)):
            if given.dim() != 2 or given.shape[1] != width:
                raise ValueError(
                    f"rows.{name}: expected shape (B, {width}), got {tuple(given.shape)}; use the model's own encode"
                )
        parts, sparse = [], self.sparse
        for group, (table, pick, bags) in enumerate(zip(self.tables, self._picks, self._bags, strict=True)):
            picked = codes if len(pick) == self.num_codes else codes[:, pick]
            assert isinstance(table, nn.Embedding)
            first = self.get_buffer(f"first_{group}")
            if bags:
                present = picked >= 0 if sparse else None
                vectors = look_up(table.weight, picked.clamp(min=0) + first, present, sparse=sparse)
                found = pooled(vectors, picked, len(pick) - sum(bag.max_length for bag in bags), bags)
            else:
                found = [look_up(table.weight, picked + first, sparse=sparse).flatten(1)]
            if self.slots is not None:
                found = [_by_slot(part, table.embedding_dim, self.slots) for part in found]
            parts += found
        if self._plain:
            plain = numbers if len(self._plain) == self.num_numbers else numbers[:, self._plain]
            parts.append(plain if self.slots is None else plain.unsqueeze(1).expand(-1, self.slots, -1))
        if self.number_weight is not None and self.number_bias is not None:
            chosen = numbers[:, self.get_buffer("owner")]
            chosen = chosen if self.slots is None else chosen.unsqueeze(1)
            parts.append(torch.relu(chosen * self.number_weight + self.number_bias))
        return torch.cat(parts, dim=-1)


def _by_slot(part: Tensor, row: int, slots: int) -> Tensor:
    """Rows of a table side by side, ``(B, n row)``, whose parts are the slots': ``(B, slots, n row / slots)``."""
    count, width = part.shape[1] // row, row // slots
    # Not unflatten and flatten: the older exporter to ONNX makes a constant of the rows that they leave out.
    columns = part.reshape(part.shape[0], count, slots, width).transpose(1, 2)
    return columns.reshape(part.shape[0], slots, count * width)


def _width(column: EmbeddedColumn) -> int:
    assert column.width is not None  # of a column that has the embedding
    return column.width


def _follow(embedding: FeatureEmbedding, _: object) -> None:
    """With ``assign=True`` the parameters have a new place, and the indices may have been left on the meta device."""
    device = next(embedding.parameters(), embedding.get_buffer("owner")).device
    if device != embedding.get_buffer("owner").device:
        embedding._set_indices(device)


def sparse_tables(model: nn.Module) -> list[nn.Parameter]:
    """The tables of a model whose gradients are sparse, and that are trained."""
    found = [module for module in model.modules() if isinstance(module, FeatureEmbedding) and module.sparse]
    weights = (parameter for embedding in found for parameter in embedding.tables.parameters())
    return [weight for weight in weights if weight.requires_grad]
