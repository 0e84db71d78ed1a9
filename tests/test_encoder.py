"""The encoder of a model as an object of its own: what it is made of, and its file."""

from __future__ import annotations

import copy
import json
import os
import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ple_fast.model import encode
from ple_fast_encoder import Categorical, Encoder, Hashed, Numeric
from tests.model_helpers import COLUMNS, model, table
from tests.test_encoder_rows import COLUMNS as EVERY
from tests.test_encoder_rows import full


def test_a_model_has_the_encoder_of_its_columns() -> None:
    made, data = model(), table()[0]
    encoder = made.encoder()
    assert encoder.columns is made.columns and made.encoder() is encoder
    codes, numbers = encoder.encode(data)
    assert codes.dtype == np.int32 and numbers.dtype == np.float32
    for rows in (made.encode(data), encode(data, made.columns)):
        assert np.array_equal(rows.codes.numpy(), codes) and np.array_equal(rows.numbers.numpy(), numbers)
    made.columns = tuple(
        replace(c, missing="mean") if isinstance(c, Numeric) and c.name == "age" else c for c in made.columns
    )
    row: dict[str, Any] = {"country": None, "age": None, "hour": 3, "amount": 1.0}
    assert made.encode({name: [value] for name, value in row.items()}).numbers[0, 0] == 0
    with pytest.raises(ValueError, match="column 'age': expected numbers, got 1 of 1 missing"):
        encoder.rows([row])


def test_models_with_an_encoder_are_copied_and_pickled() -> None:
    made, data = model(), table(3)[0]
    rows = made.encode(data)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        again = twin.encode(data)
        assert all(np.array_equal(a, b) for a, b in zip(again, rows, strict=True))
    encoder = pickle.loads(pickle.dumps(made.encoder()))
    assert encoder.columns == made.columns


@pytest.mark.filterwarnings("ignore:column .*expected values")
def test_its_file_gives_the_same_bits(tmp_path: Path) -> None:
    encoder, data = Encoder(EVERY), full(30)
    encoder.save(tmp_path / "encoder.json")
    loaded = Encoder.load(str(tmp_path / "encoder.json"))
    assert loaded.columns == EVERY and (loaded.num_codes, loaded.num_numbers) == (
        encoder.num_codes,
        encoder.num_numbers,
    )
    for rows in (1, 30):
        part = {name: column[:rows] for name, column in data.items()}
        assert [a.tobytes() for a in loaded.encode(part)] == [a.tobytes() for a in encoder.encode(part)]


def test_a_file_is_replaced_whole_and_readable_as_any_new_one(tmp_path: Path) -> None:
    file = tmp_path / "encoder.json"
    encoders = [Encoder((Numeric("x", mean=float(number)),)) for number in range(4)]
    plain = tmp_path / "plain"
    plain.touch()

    def save(encoder: Encoder) -> None:
        for _ in range(20):
            encoder.save(file)

    threads = [threading.Thread(target=save, args=(encoder,)) for encoder in encoders]
    encoders[0].save(file)
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert Encoder.load(file).columns in [encoder.columns for encoder in encoders]
    assert sorted(os.listdir(tmp_path)) == ["encoder.json", "plain"]
    assert file.stat().st_mode == plain.stat().st_mode
    with pytest.raises(FileNotFoundError):
        encoders[0].save(tmp_path / "nowhere" / "encoder.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content | {"format": "other"}, "expected the format 'ple_fast_encoder'"),
        (lambda content: content | {"version": 2}, "expected version 1, got 2; a newer ple_fast wrote it"),
        (lambda content: [content], "expected the format"),
        (lambda content: content | {"columns": []}, "expected columns that Encoder.save wrote"),
        (lambda content: content | {"columns": [3]}, "expected columns that Encoder.save wrote"),
        (lambda content: content | {"columns": [{"kind": "Text", "name": "x"}]}, "expected a kind of Categorical"),
        (lambda content: content | {"columns": [{"kind": "Numeric", "name": "x", "scale": 1}]}, "scale"),
        (lambda content: {"format": content["format"], "version": 1}, "columns"),
    ],
)
def test_a_file_that_is_damaged_or_another_is_refused(change: Any, says: str, tmp_path: Path) -> None:
    file = tmp_path / "encoder.json"
    Encoder(COLUMNS).save(file)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=says) as error:
        Encoder.load(file)
    assert str(error.value).startswith(str(file))
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match="expected JSON that"):
        Encoder.load(file)
    with pytest.raises(FileNotFoundError):
        Encoder.load(tmp_path / "none.json")


def test_columns_that_make_no_encoder_are_refused() -> None:
    with pytest.raises(TypeError, match="expected at least one Categorical, Hashed or Numeric, got none"):
        Encoder(())
    with pytest.raises(TypeError, match="got 'age'"):
        Encoder(("age",))  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(ValueError, match="expected every name once, got"):
        Encoder((Numeric("x"), Hashed("x", 3)))
    with pytest.raises(ValueError, match="column 'b': expected share to name a column with an embedding"):
        Encoder((Categorical("b", share="a"),))


def test_threads_share_one() -> None:
    encoder, data = Encoder(COLUMNS), table(8)[0]
    rows = [{name: column[row].item() for name, column in data.items()} for row in range(8)]
    expected = [part.tobytes() for part in encoder.rows(rows)]
    wrong: list[Any] = []

    def use() -> None:
        for _ in range(200):
            if [part.tobytes() for part in encoder.rows(rows)] != expected:
                wrong.append(1)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
