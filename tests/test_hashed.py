"""Hashing of ids: the same bucket in every process, from every library, spread evenly; what is refused."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from ple_fast.model import Categorical, Hashed, columns_from
from ple_fast_encoder import Encoder
from ple_fast_encoder.hashed import mixed

NAN = math.nan
BITS = 2**64 - 1


def plain_mix(bits: int) -> int:
    """SplitMix64 with ints of Python."""
    bits = (bits + 0x9E3779B97F4A7C15) & BITS
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & BITS
    return bits ^ (bits >> 31)


def plain_code(value: int | str, buckets: int) -> int:
    bits = value & BITS if isinstance(value, int) else int.from_bytes(
        hashlib.blake2b(value.encode(), digest_size=8).digest(), "little"
    )  # fmt: skip
    return 1 + plain_mix(bits) % buckets


def test_the_mix_is_that_of_the_published_generator() -> None:
    """First outputs of SplitMix64 for two seeds."""
    assert mixed(np.array([0, 1234567], dtype=np.uint64)).tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]


# Once computed, for ever kept: saved models depend on them.
BUCKETS: dict[Any, int] = {0: 4995, 1: 745530, -1: 55612, 2**40: 661465, "item_1": 296703, "ü": 462323, "": 773483}


@pytest.mark.parametrize(("value", "bucket"), BUCKETS.items(), ids=repr)
def test_buckets_stay_what_they_are(value: Any, bucket: int) -> None:
    assert Hashed("x", 1_000_003).encode([value]).tolist() == [1 + bucket]
    assert plain_code(value, 1_000_003) == 1 + bucket


@pytest.mark.slow  # imports torch anew
def test_buckets_are_the_same_in_a_process_with_another_seed_of_hash() -> None:
    code = "from ple_fast.model import Hashed; print(Hashed('x', 10**6).encode(['item_1', 'ü', '7', 'x']).tolist())"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(Hashed("x", 10**6).encode(["item_1", "ü", "7", "x"]).tolist())


@pytest.mark.parametrize("buckets", [1, 2, 1000, 2**31 - 1])
def test_codes_of_ints_are_those_of_the_formula_for_every_dtype(buckets: int) -> None:
    column = Hashed("x", buckets)
    for dtype in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
        info = np.iinfo(dtype)
        values = [info.min, info.min + 1, 0, 1, 99, info.max - 1, info.max]
        expected = [plain_code(value, buckets) for value in values]
        codes = column.encode(np.array(values, dtype=dtype))
        assert codes.dtype == np.int32
        assert codes.tolist() == expected
        assert column.encode(values).tolist() == expected
        assert column.encode(list(map(str, values))).tolist() == expected
        assert column.encode(pd.Series(values, dtype=dtype).astype("category")).tolist() == expected


@pytest.mark.parametrize(
    ("column", "same"),
    [
        (np.array([True, False]), [1, 0]),
        (np.array([3.0, -1.0, -0.0, 2.0**63, 2.0**64, -(2.0**70)]), [3, -1, 0, 2**63, 2**64, -(2**70)]),
        (np.array([3, 2048], dtype=np.float16), [3, 2048]),
        ([Decimal(3), Fraction(4), np.True_, np.int8(-5), 6.0, True], [3, 4, 1, -5, 6, 1]),
        (["3", "-4", np.str_("5")], [3, -4, 5]),
        (np.array(["3", "12"]), [3, 12]),
        ([2**64 + 5, -(2**64)], [5, 0]),
    ],
    ids=["bools", "floats", "float16", "objects", "text", "array of text", "beyond 64 bits"],
)
def test_what_is_the_same_id_has_the_same_bucket(column: Any, same: list[int]) -> None:
    hashed = Hashed("x", 2**31 - 1)
    assert hashed.encode(column).tolist() == [plain_code(value, 2**31 - 1) for value in same]


@pytest.mark.parametrize(
    "value", ["03", "+3", "-0", " 3", "3.0", "²", "٣", "1" * 30, "", "-", "é", "e\u0301", "\udcff"]
)
def test_text_that_is_no_plain_int_is_hashed_as_text(value: str) -> None:
    bits = int.from_bytes(hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    assert Hashed("x", 10**9).encode([value]).tolist() == [1 + plain_mix(bits) % 10**9]


def test_what_is_missing_or_no_whole_number_is_unknown() -> None:
    column = Hashed("x", 10)
    assert column.encode([1, None, NAN, pd.NA, 2.5, math.inf])[1:].tolist() == [0] * 5
    assert column.encode(np.array([NAN, 2.5, math.inf, -math.inf])).tolist() == [0] * 4
    assert (
        column.encode([Decimal("NaN"), Decimal("Infinity"), Decimal("0.5"), Fraction(1, 3), 1])[:4].tolist() == [0] * 4
    )
    assert column.encode(["a", None])[1] == 0
    assert (column.encode(np.arange(100)) > 0).all()


def test_ids_spread_over_the_buckets() -> None:
    """Ids in a row, multiples of a power of two, and numbered text: 50,000 in 1,000 buckets, by chi squared."""
    for ids in (np.arange(50_000), np.arange(50_000) * 2**20, [f"item_{n}" for n in range(50_000)]):
        counts = np.bincount(Hashed("x", 1000).encode(ids), minlength=1001)
        assert counts[0] == 0
        chi = ((counts[1:] - 50) ** 2 / 50).sum()  # mean 999, deviation 45
        assert 800 < chi < 1200


def test_columns_from_hashes_what_it_is_told_to() -> None:
    table = {"user": [5, 7, None], "item": ["a", "b", "a"], "day": [1, 2, 3]}
    got = columns_from(table, categorical=["day", "user", "item"], buckets={"user": 100, "item": 50}, width=2)
    assert got == [
        Categorical("day", values=(1, 2, 3), width=2),
        Hashed("user", 100, width=2),
        Hashed("item", 50, width=2),
    ]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Hashed("x", 0), ValueError, "'x': buckets: expected 1 or more, got 0"),
        (lambda: Hashed("x", 2.5), TypeError, "'x': buckets: expected an int"),  # type: ignore[arg-type]  # the mistake under test
        (lambda: Hashed("x", 2**31), ValueError, "'x': expected at most 2147483647 buckets, got 2147483648"),
        (lambda: Hashed("x", 3, width=0), ValueError, "'x': width: expected 1 or more"),
        (lambda: Hashed("x", 3).encode([1, "a"]), TypeError, "'x': expected text or ints as ids, got numbers, text"),
        (lambda: Hashed("x", 3).encode([b"a"]), TypeError, "'x': .*got bytes"),
        (lambda: Hashed("x", 3).encode(np.array(["2020"], "datetime64[s]")), TypeError, "datetime64"),
        (lambda: Hashed("x", 3).encode([[1], [2]]), ValueError, "'x': expected one value per row.*pooling="),
        (lambda: columns_from({"x": [b"a"]}, categorical=["x"], buckets={"x": 3}), TypeError, "'x'.*bytes"),
        (lambda: columns_from({"x": []}, categorical=["x"], buckets={"x": 3}), ValueError, "at least one row"),
    ],
)
def test_hashing_refuses_in_sentences(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize("padding", [0, "0", -7, "-7", 2**64 - 1, str(2**64 - 1)])
def test_what_fills_rows_up_is_one_id_as_an_int_and_as_text(padding: Any) -> None:
    number, options = int(padding), {"pooling": "sum", "max_length": 3, "padding": padding}
    column: Any = Hashed("x", 1000, **options)
    sharing: Any = Categorical("y", share="x", **options)
    numbers, texts = [[number, 5], [6], [number]], [[str(number), "5"], ["6"], [str(number)]]
    for rows in (numbers, texts):
        many = [*rows, *([[1]] if rows is numbers else [["1"]]) * 100]  # a pass of NumPy
        for given in (rows, many, pd.Series(many), *([pa.array(many)] if rows is texts or abs(number) < 2**63 else [])):
            codes = column.encode(given)
            assert (codes[:3] >= 0).sum(1).tolist() == [1, 1, 0]
            assert np.array_equal(Encoder([column, sharing]).encode({"x": given, "y": given})[0][:, :3], codes)
            assert np.array_equal(Encoder([column, sharing]).encode({"x": given, "y": given})[0][:, 3:], codes)
        (fitted,) = columns_from(
            {"x": rows}, categorical=["x"], buckets={"x": 1000}, pooling={"x": "sum"}, padding=padding
        )
        assert fitted.max_length == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("padding", ["00", "+0", "٣", "x" * 30, "9" * 5000, 10**30, 2**70])
def test_text_that_is_no_int_and_ints_beyond_64_bits_fill_rows_up_as_they_are(padding: Any) -> None:
    column = Hashed("x", 1000, pooling="sum", max_length=2, padding=padding)
    assert (column.encode([[padding], [1] if isinstance(padding, int) else ["1"]]) >= 0).sum() == 1
    if padding == "00":
        assert (column.encode([["0"]]) >= 0).sum() == 1
