"""Saves that are killed, and loads while another process saves: always the whole model of one save."""

from __future__ import annotations

import multiprocessing
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ple_fast.losses import TaskLoss
from ple_fast.model import MultiTaskModel, Numeric

READS = 10
"""Loads while the writer writes, before it is killed."""


def make_model() -> MultiTaskModel:
    """Large enough that a save takes some milliseconds, in several writes."""
    columns = [Numeric(f"column{number}") for number in range(8)]
    return MultiTaskModel(columns, [TaskLoss("a"), TaskLoss("b")], trunk_options={"expert_units": (256, 64)})


def fill(model: MultiTaskModel, number: int) -> None:
    """Every parameter is the number of the save, so that a mixture of two shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(number))


def number_of(directory: Path) -> int:
    """The save that ``load`` finds.

    Raises:
        ValueError: parameters of several saves; whatever ``load`` raises.
    """
    found = {value for p in MultiTaskModel.load(directory).parameters() for value in p.unique().tolist()}
    if len(found) != 1:
        raise ValueError(f"parameters of several saves: {sorted(found)[:5]}")
    return int(found.pop())


def write(directory: str, first: int, done: Connection) -> None:
    """Saves number after number, for ever, and tells each."""
    torch.set_num_threads(1)
    model = make_model()
    for number in range(first, 1 << 24):
        fill(model, number)
        model.save(directory)
        done.send(number)


def run(seed: int, trials: int, figures: dict[str, Any]) -> Iterator[str | None]:
    """One kill per trial."""
    figures.update(saves=0, loads=0)
    dice = random.Random(seed)
    # The child begins to save at once, where a fresh interpreter would first import torch for seconds.
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        directory, last, is_there = Path(folder) / "model", 0, False
        for trial in range(trials):
            if not is_there:  # the first one, or after a failure
                model = make_model()
                fill(model, last)
                model.save(directory)
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=write, args=(str(directory), last + 1, sender), daemon=True)
            child.start()
            sender.close()
            failures = []
            try:
                receiver.poll(30)  # the first save is done
                for _ in range(READS):
                    failures += _loaded(directory, figures, 0, None, "while another process saves")
                time.sleep(dice.uniform(0.0, 0.03))
            finally:
                child.kill()
                child.join()
            assert child.exitcode == -signal.SIGKILL, "the child must not end by itself"
            before = last
            while receiver.poll():
                try:
                    last = receiver.recv()
                except EOFError:
                    break
            receiver.close()
            figures["saves"] += last - before
            failures += _loaded(directory, figures, last, last + 1, f"after a kill behind save {last}")
            last += 1  # which may have been written
            is_there = not failures
            yield f"kill {trial} (seed {seed}): {'; '.join(failures)}" if failures else None


def _loaded(directory: Path, figures: dict[str, Any], lowest: int, highest: int | None, when: str) -> list[str]:
    """What was wrong of one load."""
    figures["loads"] += 1
    try:
        number = number_of(directory)
    except Exception as error:  # whatever is raised is a failure to be told
        return [f"load {when}: {type(error).__name__}: {error}"]
    if number < lowest or (highest is not None and number > highest):
        return [f"load {when}: expected save {lowest} or {highest}, got {number}"]
    return []
