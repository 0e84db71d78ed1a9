"""Files of models that were damaged: every flipped bit, and every key of a configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ple_fast.model import MultiTaskModel
from tests.storage_helpers import WEIGHTS, model, save_version_1


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def bits(size: int, count: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(0)
    yield from torch.randint(8 * size, (count,), generator=generator).tolist()


def test_every_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    model(1).save(tmp_path)
    file = tmp_path / WEIGHTS
    data = file.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    chosen = [*range(64), *(bits(length, 150)), *(bits(len(data), 100)), *range(8 * len(data) - 64, 8 * len(data))]
    for bit in chosen:
        file.write_bytes(flipped(data, bit))
        with pytest.raises(ValueError, match=r"model\.safetensors: expected"):
            MultiTaskModel.load(tmp_path)
    for end in (0, 7, 8, 100, length, len(data) - 1):
        file.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"model\.safetensors: expected"):
            MultiTaskModel.load(tmp_path)
    file.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match=r"model\.safetensors: expected"):
        MultiTaskModel.load(tmp_path)


def test_a_flipped_bit_of_a_configuration_of_version_1_is_loaded_or_refused_by_name(tmp_path: Path) -> None:
    """It has no checksum there."""
    save_version_1(model(1), tmp_path)
    file = tmp_path / "config.json"
    data = file.read_bytes()
    for bit in bits(len(data), 200):
        file.write_bytes(flipped(data, bit))
        assert str(tmp_path) in (refusal(tmp_path) or str(tmp_path))


def refusal(directory: Path) -> str | None:
    """What load says, None where it loads; anything but a ValueError is raised."""
    try:
        MultiTaskModel.load(directory)
    except ValueError as error:
        return str(error)
    return None


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"a": NaN}', DEEP, "\ud800"], ids=range(7))
def test_a_configuration_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    save_version_1(model(), tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"config\.json: expected"):
        MultiTaskModel.load(tmp_path)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


WRONG: list[Any] = [1, None, "x", 1.5, True, [], {}, [None], {"a": 1}, nested(400)]


def keys_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a configuration."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from keys_of(entry, (*path, key))


def changed(config: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    copied = json.loads(json.dumps(config))
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return copied


def test_a_key_that_is_missing_or_of_another_type_is_refused_with_file_and_key(tmp_path: Path) -> None:
    save_version_1(model(), tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    places = list(keys_of(config))
    assert len(places) > 40

    def refused(one: Any, key: Any, needed: bool) -> None:
        file.write_text(json.dumps(one), encoding="utf-8")
        said = refusal(tmp_path)
        assert said is not None or not needed, (key, one)
        assert said is None or str(tmp_path) in said
        assert said is None or not needed or key in said, (key, said)

    for path in places:
        optional = "options" in path or "values" in path
        is_list_entry = isinstance(path[-1], int)
        refused(
            changed(config, path, lambda inner, key: inner.__delitem__(key)),
            path[-1],
            not optional and not is_list_entry,
        )
        for wrong in WRONG:

            def put(inner: Any, key: Any, wrong: Any = wrong) -> None:
                inner[key] = wrong

            refused(changed(config, path, put), path[-1], False)
    for path in [(), ("columns", 0), ("tasks", 0), ("trunk",)]:
        refused(changed(config, (*path, "novel"), put), "novel", True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 3}, "expected version 1, got 3"),
        ({"version": True}, "expected version 1, got True"),
        ({"format": "other"}, "expected format 'ple_fast.MultiTaskModel', got 'other'"),
        ({"weights_sha256": "0"}, "different saves, or damaged"),
        ({"columns": [{"kind": "Image", "name": "x"}]}, "expected a kind of Categorical, Hashed, Numeric, got 'Image'"),
        ({"trunk": {"kind": "transformer", "options": {}}}, "expected one of ple, cgc"),
        ({"dtype": "complex64"}, r"config.json: dtype: expected one of float16, .*, got 'complex64'"),
        ({"tower_units": [10**13]}, r"config.json: .*"),
        ({"tower_units": [10**30]}, r"config.json: .*"),
        ({"trunk": {"kind": "ple", "options": {"experts": 3}}}, r"config.json: trunk_options: expected options"),
    ],
)
def test_a_configuration_that_we_do_not_know_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    save_version_1(model(), tmp_path, **change)
    with pytest.raises(ValueError, match=says):
        MultiTaskModel.load(tmp_path)
