"""Saves of models: at any fault and under any number of savers and readers, what is loaded is one save, whole."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ple_fast.model import MultiTaskModel, storage, tensor_file
from tests.storage_helpers import WEIGHTS, model, names, number_of, save_version_1


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
