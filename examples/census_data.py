"""UCI Census-Income (KDD) as the examples train on it: the official split, the columns, the labels of two tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ple_fast.model import Encoded, columns_from, encode
from ple_fast_encoder import Column

DATA = Path(__file__).parent / "data" / "census_income.parquet"
ALL_ROWS = 299_285
INCOME, NEVER_MARRIED = "income", "never married"
# The labels are made of these, or (instance_weight) they say how the survey was sampled: none of them is a feature.
NO_FEATURES = ("education", "marital_stat", "income", "instance_weight", "split")
NUMERIC = (
    "age",
    "wage_per_hour",
    "capital_gains",
    "capital_losses",
    "dividends_from_stocks",
    "num_persons_worked_for_employer",
    "weeks_worked_in_year",
)
SPLITS = ("train", "validation", "test")


class Split(NamedTuple):
    """Encoded rows and their labels."""

    rows: Encoded
    labels: dict[str, np.ndarray[Any, Any]]


@dataclass
class Data:
    """The three splits, and the columns that encoded them."""

    columns: list[Column]
    train: Split
    validation: Split
    test: Split


def load(rows: int | None, seed: int = 0) -> Data:
    """The official training part, and the official test part cut into two halves; of ``rows`` rows where given."""
    frame = pd.read_parquet(DATA)
    rng = np.random.default_rng(seed)
    official = {name: np.flatnonzero(frame["split"] == name) for name in ("train", "test")}
    share = 1.0 if rows is None else min(rows / len(frame), 1.0)
    picked = {name: rng.permutation(index)[: round(share * len(index))] for name, index in official.items()}
    middle = len(picked["test"]) // 2
    train = frame.iloc[picked["train"]]
    columns = columns_from(
        train,
        categorical=[name for name in frame.columns if name not in (*NO_FEATURES, *NUMERIC)],
        numeric=NUMERIC,
        transform="log1p",
    )

    def split(part: pd.DataFrame) -> Split:
        labels = {
            INCOME: (part["income"] == "50000+.").to_numpy(np.float32),
            NEVER_MARRIED: (part["marital_stat"] == "Never married").to_numpy(np.float32),
        }
        return Split(encode(part, columns), labels)

    halves = frame.iloc[picked["test"][:middle]], frame.iloc[picked["test"][middle:]]
    return Data(columns, split(train), *map(split, halves))


def about(data: Data) -> str:
    """Of how many rows a run is, and which part of the data that is."""
    sizes = {name: len(getattr(data, name).rows) for name in SPLITS}
    rows = sum(sizes.values())
    part = "all of the data" if rows == ALL_ROWS else f"{rows / ALL_ROWS:.0%} of the data"
    return f"Rows: {', '.join(f'{size:,} {name}' for name, size in sizes.items())}: {part}."
