"""Threads that read a model, score it or train it at the same time."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.fit_helpers import are_equal, model, modes, state, table


def test_threads_that_read_a_model_in_train_mode_agree_bit_for_bit_and_change_nothing() -> None:
    data, labels = table(1000)
    net = model()
    net.fit(data, labels, batch_size=256)
    assert net.training
    kept, before = state(net), modes(net)
    served = copy.deepcopy(net).eval()
    expected, gates = served.predict(data, batch_size=256), served.gate_weights(data, batch_size=256)

    def read(turn: int) -> bool:
        if turn % 3:
            return are_equal(net.predict(data, batch_size=256), expected)
        found = net.gate_weights(data, batch_size=256)
        return all(
            torch.equal(g, e)
            for ours, theirs in zip(found, gates, strict=True)
            for g, e in zip(ours, theirs, strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(24)))
    assert are_equal(state(net), kept)
    assert modes(net) == before


def test_no_mode_is_flipped_while_a_model_is_read_or_scored() -> None:
    """Seen from a hook in mid-call, where another thread would see it."""
    data, labels = table()
    net = model()
    net.towers[1].eval()
    seen: list[dict[str, bool]] = []

    class Watched(nn.Module):
        """Not registered as a hook, whose reference to the model would be led to the view."""

        def forward(self, x: Tensor) -> Tensor:
            seen.append(modes(net))
            return x

    tower: Any = net.towers[0]
    tower.append(Watched())
    before = modes(net)
    net.predict(data)
    net.gate_weights(data)
    net.fit(data, labels, batch_size=16, epochs=2, validation=(data, labels))
    assert seen == [before] * (2 + 2 * (4 + 1))


def test_a_model_that_is_trained_is_served_meanwhile_and_trains_the_same() -> None:
    data, labels = table(256)
    expected = model()
    expected.fit(data, labels, epochs=8, batch_size=16)
    net = model()
    before, done, failures = modes(net), threading.Event(), []

    def serve() -> int:
        calls = 0
        while not done.is_set():
            finite = all(np.isfinite(value).all() for value in net.predict(data).values())
            if not finite or modes(net) != before:
                failures.append(calls)
            calls += 1
        return calls

    with ThreadPoolExecutor(2) as pool:
        serving = [pool.submit(serve) for _ in range(2)]
        net.fit(data, labels, epochs=8, batch_size=16)
        done.set()
        assert all(future.result() > 0 for future in serving)
    assert not failures
    assert are_equal(state(net), state(expected))
    assert modes(net) == before
