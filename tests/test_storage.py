"""Files of models: at any fault and under any number of savers and readers, what is loaded is one save, whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, MultiTaskModel, Numeric, storage, tensor_file
from ple_fast.model.columns import to_json
from ple_fast.model.tensor_file import read

WEIGHTS = "model.safetensors"
VALUES = ("de", "fr", "it", "\udcff")  # the last one as Python reads a file name that is no text


def model(number: int = 0, units: int = 4) -> MultiTaskModel:
    """Every parameter and the configuration say which one it is."""
    columns: list[Any] = [Categorical("country", values=VALUES), Numeric("age", mean=float(number))]
    tasks = [TaskLoss("click"), TaskLoss("watch", "regression")]
    net = MultiTaskModel(columns, tasks, trunk_options={"expert_units": (units,)}, tower_units=(3,))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(float(number))
    return net


def number_of(directory: Path) -> int:
    """Of the model in a directory, which must be one save, whole."""
    net = MultiTaskModel.load(directory)
    column = net.columns[1]
    assert isinstance(column, Numeric)
    found = {column.mean, *(value for p in net.parameters() for value in p.unique().tolist())}
    assert len(found) == 1, f"parts of several saves: {found}"
    return int(found.pop())


def config_of(net: MultiTaskModel) -> dict[str, Any]:
    return {
        "format": "ple_fast.MultiTaskModel",
        "version": 1,
        "dtype": "float32",
        "columns": [to_json(column) for column in net.columns],
        "tasks": [asdict(task) for task in net.tasks],
        **net._config,
    }


def save_version_1(net: MultiTaskModel, directory: Path, **changes: Any) -> None:
    """As the first version did."""
    directory.mkdir(exist_ok=True)
    safetensors.torch.save_model(net, str(directory / WEIGHTS), metadata={"format": "ple_fast.MultiTaskModel"})
    config = config_of(net) | {"weights_sha256": read(directory / WEIGHTS).sha256} | changes
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


# --- faults ---


class Fault(Exception):
    """What a full disk, a signal or a lost server raises."""


class Breaker:
    """Counts the steps that a save takes outside, and raises in one of them.

    Before it is done; after it is done; or before, and in all that follow, as if the process had been killed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: int, how: str) -> None:
        self.steps: list[str] = []
        self.fails, self.how = fails, how
        for owner, name in (
            (os, "fsync"), (os, "open"), (Path, "replace"), (Path, "open"), (Path, "mkdir"), (Path, "unlink"),
            (tensor_file, "write"), (storage, "_lock"), (os, "close"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name), name))

    def watched(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            number = len(self.steps)
            self.steps.append(name)
            if (number == self.fails and self.how == "before") or (number >= self.fails and self.how == "killed"):
                raise Fault(name)
            result = function(*arguments, **options)
            if number == self.fails:
                raise Fault(name)
            return result

        return call


@pytest.mark.parametrize("how", ["before", "after", "killed"])
@pytest.mark.parametrize("first", ["version 1", "version 2", "nothing"])
def test_a_fault_at_any_step_of_a_save_leaves_the_old_model_or_the_new_one(
    first: str, how: str, tmp_path: Path
) -> None:
    new, seen = model(2), set()
    new.save(tmp_path / "before")  # what is imported at the first save is imported now
    for fails in range(100):
        directory = tmp_path / str(fails)
        if first != "nothing":
            (save_version_1 if first == "version 1" else MultiTaskModel.save)(model(1), directory)
        with pytest.MonkeyPatch.context() as patch:
            breaker = Breaker(patch, fails, how)
            try:
                new.save(directory)
            except Fault as error:
                seen.add(str(error))
        if len(breaker.steps) <= fails:
            break
        if first == "nothing" and not (directory / WEIGHTS).exists():
            with pytest.raises(FileNotFoundError):
                MultiTaskModel.load(directory)
        else:
            assert number_of(directory) in (1, 2)
        new.save(directory)
        assert number_of(directory) == 2
        assert names(directory) == [WEIGHTS], "what the broken save left is removed by the next one"
    assert seen >= ({"fsync", "replace", "write", "open"} if how != "killed" else {"unlink", "close"})
    assert number_of(directory) == 2, "the last one was whole"


def test_file_and_folders_are_brought_to_the_disk_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[Any] = []
    fsync, replace = os.fsync, Path.replace

    def inode(path: Path) -> int:
        return path.stat().st_ino

    def synced(descriptor: int) -> None:
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def replaced(file: Path, target: Path) -> Path:
        done.append("replace")
        return replace(file, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    model().save(tmp_path / "a" / "b")
    folders = [inode(tmp_path / "a" / "b"), inode(tmp_path / "a"), inode(tmp_path)]
    assert done == [inode(tmp_path / "a" / "b" / WEIGHTS), "replace", *folders]


def write_for_ever(directory: str, first: int) -> None:
    torch.set_num_threads(1)
    nets = [model(first, 64), model(first + 1, 64)]
    while True:
        for net in nets:
            net.save(directory)


def started(directory: Path, first: int) -> multiprocessing.Process:
    context: Any = multiprocessing.get_context("fork")  # a fresh interpreter would import torch for seconds
    child: multiprocessing.Process = context.Process(target=write_for_ever, args=(str(directory), first), daemon=True)
    child.start()
    return child


forks = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system has no fork")


@forks
def test_processes_that_save_are_read_without_a_fault_and_killed_without_a_loss(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    model(0, 64).save(directory)
    for kill in range(4):
        children = [started(directory, 1), started(directory, 3)]
        until = time.monotonic() + 0.05 + kill * 0.013
        found: set[int] = set()
        while time.monotonic() < until or (found <= {0} and time.monotonic() < until + 20):
            found.add(number_of(directory))
        assert found <= set(range(5))
        for child in children:
            child.kill()
        for child in children:
            child.join()
            assert child.exitcode == -signal.SIGKILL, "a save failed"
        assert number_of(directory) in range(1, 5)
        assert len(names(directory)) <= 3, "each leaves one file at most, which the next save removes"
    model(5, 64).save(directory)
    assert number_of(directory) == 5
    assert names(directory) == [WEIGHTS]


@pytest.mark.parametrize("many", [False, True], ids=["one model", "several models"])
def test_threads_may_save_into_one_directory_while_others_read(many: bool, tmp_path: Path) -> None:
    nets = [model(number) for number in range(4)] if many else [model(3)] * 4
    save_version_1(nets[0], tmp_path)
    stop, found = threading.Event(), []

    def reads() -> None:
        while not stop.is_set():
            found.append(number_of(tmp_path))

    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(reads) for _ in range(2)]
        saves = [pool.submit(nets[turn % 4].save, tmp_path) for turn in range(60)]
        for save in saves:
            save.result()
        stop.set()
        for reader in readers:
            reader.result()
    assert set(found) <= ({0, 1, 2, 3} if many else {3})
    assert number_of(tmp_path) in (range(4) if many else (3,))
    assert names(tmp_path) == [WEIGHTS]


def test_a_save_removes_no_file_of_another_that_lives(tmp_path: Path) -> None:
    handle, path = storage._new_file(tmp_path)
    with handle:
        left = tmp_path / f".{WEIGHTS}.123.tmp"
        left.touch()
        model(1).save(tmp_path)
        assert path.exists() and not left.exists()
    model(2).save(tmp_path)
    assert names(tmp_path) == [WEIGHTS]


def test_where_files_cannot_be_locked_only_old_ones_are_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(storage, "fcntl", None)
    for name, age in (("old", 2 * storage.OLD), ("new", 0)):
        file = tmp_path / f".{WEIGHTS}.{name}.tmp"
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    model(1).save(tmp_path)
    assert names(tmp_path) == [f".{WEIGHTS}.new.tmp", WEIGHTS]
    assert number_of(tmp_path) == 1


def test_a_file_that_is_swept_before_it_is_locked_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lock = storage._lock
    times: list[str] = []

    def slow(handle: Any, *, wait: bool) -> bool | None:
        if wait and not times:
            times.append(handle.name)
            storage._remove_left(tmp_path)  # another save's
        return lock(handle, wait=wait)

    monkeypatch.setattr(storage, "_lock", slow)
    model(1).save(tmp_path)
    assert times and number_of(tmp_path) == 1
    assert names(tmp_path) == [WEIGHTS]


def test_a_model_that_is_trained_while_it_is_saved_can_be_loaded(tmp_path: Path) -> None:
    net = model(1, 256)
    stop = threading.Event()

    def train() -> None:
        with torch.no_grad():
            while not stop.is_set():
                for parameter in net.parameters():
                    parameter.add_(1.0)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(10):
            net.save(tmp_path)
            MultiTaskModel.load(tmp_path)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_saved_files_are_as_readable_as_the_umask_says(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        model().save(tmp_path / "saved")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "saved").iterdir()} == {mode}


# --- damage ---


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
        ({"columns": [{"kind": "Image", "name": "x"}]}, "expected a kind of Categorical, Numeric, got 'Image'"),
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


# --- versions ---


def test_a_folder_of_version_1_is_loaded_and_replaced(tmp_path: Path) -> None:
    save_version_1(model(7), tmp_path)
    assert number_of(tmp_path) == 7
    model(8).save(tmp_path)
    assert number_of(tmp_path) == 8
    assert names(tmp_path) == [WEIGHTS], "a configuration that nobody reads would mislead"


def test_files_of_two_saves_of_version_1_are_told_apart(tmp_path: Path) -> None:
    save_version_1(model(1), tmp_path)
    before = (tmp_path / "config.json").read_text()
    save_version_1(model(2), tmp_path)
    (tmp_path / "config.json").write_text(before)
    with pytest.raises(ValueError, match="different saves"):
        MultiTaskModel.load(tmp_path)


def test_a_configuration_of_somebody_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format": "theirs"}')
    model(1).save(tmp_path)
    assert names(tmp_path) == ["config.json", WEIGHTS]
    assert number_of(tmp_path) == 1


def test_the_configuration_can_be_read_by_people(tmp_path: Path) -> None:
    model(3).save(tmp_path)
    text = bytes(safetensors.torch.load_file(tmp_path / WEIGHTS)["config.json"].tolist()).decode("utf-8", "replace")
    assert json.loads(text)["columns"][1]["mean"] == 3.0


def test_a_later_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(storage, "VERSION", 3)
        model().save(tmp_path)
    with pytest.raises(ValueError, match="expected version 2, got 3; load it with the release"):
        MultiTaskModel.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_in_the_place_of_its_directory_is_refused(name: str, tmp_path: Path) -> None:
    save_version_1(model(), tmp_path)
    with pytest.raises(ValueError, match=f"directory: expected the directory that save wrote.*load '{tmp_path}'"):
        MultiTaskModel.load(tmp_path / name)


def test_nothing_to_load_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        MultiTaskModel.load(tmp_path)
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / WEIGHTS)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        MultiTaskModel.load(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_loading_never_unpickles(version: int, tmp_path: Path) -> None:
    net = model()
    if version == 1:
        save_version_1(net, tmp_path)
    torch.save(net, tmp_path / WEIGHTS)  # a pickle under the name of the weights
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the format of safetensors"):
        MultiTaskModel.load(tmp_path)
