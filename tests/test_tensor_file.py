"""Our files are those of safetensors, and the other way round; a checksum over every bit."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ple_fast.model import tensor_file

TENSORS = {
    f'{name} \u00e4 "{code}\\': tensor.to(dtype)
    for code, dtype in tensor_file.DTYPES.items()
    for name, tensor in {
        "matrix": torch.arange(15.0).view(5, 3),
        "one": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "turned": torch.arange(6.0).view(2, 3).t(),
    }.items()
}


def written(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    with file.open("wb") as handle:
        tensor_file.write(handle, tensors, metadata)
    return file


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float()), name


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    file = written(tmp_path / "a", TENSORS, {"format": "x"})
    assert_equal(safetensors.torch.load_file(file), TENSORS)
    with safetensors.safe_open(file, "pt") as content:
        metadata = content.metadata()
    assert metadata.keys() == {"format", "sha256"}
    found = tensor_file.read(file)
    assert_equal(found.tensors, TENSORS)
    assert found.is_whole
    assert found.metadata == metadata


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(tensors, tmp_path / "a", metadata={"a": "b"})
    found = tensor_file.read(tmp_path / "a")
    assert_equal(found.tensors, tensors)
    assert found.metadata == {"a": "b"}
    assert not found.is_whole, "it has no checksum"


def test_large_tensors_are_read_in_chunks_and_never_held_twice(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3 * tensor_file.CHUNK // 4 + 5, dtype=torch.float32)}
    tracemalloc.start()
    found = tensor_file.read(written(tmp_path / "a", tensors, {}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_equal(found.tensors, tensors)
    assert found.is_whole
    assert peak < 2.5 * tensor_file.CHUNK, "of Python's own memory, where a copy of the file would be"


def test_a_file_is_replaced_while_it_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = written(tmp_path / "a", {"a": torch.zeros(5)}, {})
    other = written(tmp_path / "b", {"a": torch.ones(7)}, {})
    parsed = tensor_file._parsed

    def replaced(*arguments: Any) -> Any:
        other.replace(file)
        return parsed(*arguments)

    monkeypatch.setattr(tensor_file, "_parsed", replaced)
    found = tensor_file.read(file)
    assert_equal(found.tensors, {"a": torch.zeros(5)})
    assert found.is_whole


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS: list[Any] = [
    [],
    {"__metadata__": 1},
    {"__metadata__": {"a": 1}},
    {"a": 1},
    {"a": {}},
    {"a": {**ENTRY, "dtype": "C64"}},
    {"a": {**ENTRY, "dtype": ["F32"]}},
    {"a": {**ENTRY, "shape": [2.0]}},
    {"a": {**ENTRY, "shape": [True, 2]}},
    {"a": {**ENTRY, "shape": [-1, -2]}},
    {"a": {**ENTRY, "shape": [3]}},
    {"a": {**ENTRY, "shape": [2**62, 2**62]}},
    {"a": {**ENTRY, "data_offsets": [0]}},
    {"a": {**ENTRY, "data_offsets": [4, 12]}},
    {"a": ENTRY, "b": ENTRY},
    {"a": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}},
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_is_none_is_refused_before_memory_is_asked_for(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=r"a: expected"):
        tensor_file.read(tmp_path / "a")
