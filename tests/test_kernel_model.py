"""The model of kernel times: against the study that it stands on, against the launches, and against the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import aot, kernel_model
from benchmarks.environment import ROOT
from benchmarks.kernel_schedule import (
    MEMORY,
    PROCESSORS,
    Resources,
    Role,
    predict,
    predict_library,
    product,
)
from benchmarks.launches import PERSISTENT
from benchmarks.rendering import quoted
from tests.programs import IMPORT_PATH

ROWS = {"medium": 16384, "large": 65536}
DEPTHS = {"medium": (512, 256, 128), "large": (1024, 512, 256)}
"""Inputs of the first layer, of the second one, and its units."""
EXPERTS = {"medium": 8, "large": 20}
WIDE = Resources(200, 147_456, 8)
COLUMN_SUM_WAIT, COLUMN_SUM_BUSY = 0.65, 0.1
"""Microseconds of a step that sums columns as that code did, its loads not pipelined: it waits, and it keeps the
processor busy."""


def layer(rows: int, units: int, tile: tuple[int, int, int], depth: int, experts: int, gates: int = 0) -> list[Role]:
    """A forward product by groups of eight row tiles, the gates' tiles behind those of the experts."""
    tiles = experts * -(-units // tile[1])
    own = [product("tiles", 8 * tiles, tile, depth // tile[2])]
    if gates:
        own.append(product("gates", 8, (tile[0], gates, tile[2]), depth // tile[2], out=4))
    return own * (rows // tile[0] // 8)


def weight_grad(parts: int, rows: int, tile: tuple[int, int, int], tiles: int, gates: int, biases: int) -> list[Role]:
    """As the kernel was: its last programs sum columns of D, a step at a time."""
    steps = rows // parts // tile[2]
    roles = [product("tiles", tiles, tile, steps, out=4)]
    if gates:
        roles.append(product("gates", gates, (tile[1], 64, tile[2]), steps, out=4))
    roles.append(Role("biases", biases, steps, 0.0, 0.0, 4.0 * tile[0], COLUMN_SUM_WAIT, COLUMN_SUM_BUSY))
    return roles * parts


def study(size: str) -> dict[str, tuple[list[Role], float, Resources]]:
    """Roles, bytes and resources of the launches of commit 89c646c, as its tables of compiled kernels have them."""
    b, (k, h1, h2), e = ROWS[size], DEPTHS[size], EXPERTS[size]
    x, a1, a2 = (2.0 * b * n for n in (k, e * h1, e * h2))
    is_large = size == "large"
    wide, square = (128, 256, 64), (128, 128, 64)
    second = (layer(b, h2, wide, h1, e), WIDE) if is_large else (layer(b, h2, square, h1, e), Resources(108, 98_304, 8))
    grad = [product("tiles", b // 128 * 4, wide, e * h1 // 64 + 1)]
    if is_large:
        first = weight_grad(1, b, square, e * 4 * 8, 8, 80 + 1)
        last = (weight_grad(1, b, square, e * 2 * 4, 0, 40), Resources(112, 131_072, 8))
    else:
        grad = [product("tiles", b // 128 * 4, square, e * h1 // 64 + 1)]
        first = weight_grad(2, b, square, e * 2 * 4, 4, 16 + 1)
        last = (weight_grad(4, b, (64, 64, 64), e * 2 * 4, 0, 16), Resources(80, 65_536, 4))
    return {
        "first": (layer(b, h1, wide, k, e, 64 if is_large else 32), x + a1, WIDE),
        "second": (second[0], a1 + a2, second[1]),
        "data_grad": (layer(b, h1, wide, h2, e), a2 + 2 * a1, WIDE._replace(serialised=True)),
        "input_grad": (grad, a1 + x, WIDE if is_large else Resources(128, 131_072, 8)),
        "first weights": (first, 2 * a1 + x, Resources(116, 131_072, 8)),
        "last weights": (last[0], 2 * a2 + a1, last[1]),
    }


# Section 7 of the study of the machine code: microseconds of that code, by arithmetic of its own.
STUDY = {
    "medium": {
        "first": 72, "second": 32, "data_grad": 39, "input_grad": 60, "first weights": 173, "last weights": 60,
        "whole": 516,
    },
    "large": {
        "first": 2487, "second": 704, "data_grad": 1191, "input_grad": 2248, "first weights": 3732,
        "last weights": 1362, "whole": 12_500,
    },
}  # fmt: skip
DIFFERENT = {
    ("medium", "data_grad"): 0.20,  # bounded by its bytes, which the study did not count
    ("medium", "input_grad"): 0.40,  # the study took a tile of 128 x 256; the code has 128 x 128, 240 MB more from L2
}


def predicted(size: str) -> dict[str, float]:
    return {name: predict(*launch, "half").total for name, launch in study(size).items()}


@pytest.mark.parametrize("size", STUDY)
def test_one_set_of_constants_gives_the_times_of_the_study(size: str) -> None:
    times, said = predicted(size), STUDY[size]
    for name, time in times.items():
        assert abs(time / said[name] - 1) <= DIFFERENT.get((size, name), 0.16), (name, time, said[name])
    b, (_, _, h2), e = ROWS[size], DEPTHS[size], EXPERTS[size]
    outputs = 4 if size == "medium" else 5
    mixing = 2.0 * b * h2 * (3 * e + 2 * outputs)  # both mixing kernels: outputs read twice, gradient written, y and dy
    assert abs((sum(times.values()) + mixing / MEMORY * 1e6) / said["whole"] - 1) <= 0.05


def test_the_library_takes_what_the_study_says() -> None:
    for size, us in (("medium", 51), ("large", 1965)):
        b, (k, h1, _), e = ROWS[size], DEPTHS[size], EXPERTS[size]
        assert abs(predict_library(2.0 * b * k * e * h1, 0.0, "half") / us - 1) <= 0.01


def test_the_tile_that_the_study_took_gives_its_time_of_the_input_gradient() -> None:
    roles = [product("tiles", 256, (128, 256, 64), 33)]
    assert abs(predict(roles, 0.0, WIDE, "half").total / 60 - 1) <= 0.05


def test_a_persistent_launch_gains_what_the_study_says() -> None:
    for depth, gain in ((1024, 0.09), (512, 0.16), (256, 0.27)):
        roles = [product("tiles", 20480, (128, 256, 64), depth // 64)]
        ours, persistent = (predict(roles, 0.0, WIDE, "half", persistent=p).total for p in (False, True))
        assert abs(1 - persistent / ours - gain) <= 0.02


def test_what_bounds_a_launch_is_named() -> None:
    tile = (128, 256, 64)
    bound = {
        "launch": predict([product("tiles", 1, (64, 64, 64), 1)], 0.0, WIDE, "half"),
        "bytes": predict([product("tiles", 132, tile, 1)], 1e9, WIDE, "half"),
        "L2": predict([product("tiles", 132, tile, 100)], 0.0, WIDE, "half"),
        "products": predict([product("tiles", 132, (256, 256, 64), 100)], 0.0, WIDE, "half"),
        "fill and end": predict([product("tiles", 1320, tile, 1)], 0.0, WIDE, "half"),
    }
    for name, found in bound.items():
        assert found.bound == name, found


def test_programs_fill_processors_in_waves() -> None:
    roles = [product("tiles", PROCESSORS, (128, 256, 64), 100)]
    one = predict(roles, 0.0, WIDE, "half")
    more = predict([*roles, product("more", 1, (128, 256, 64), 100)], 0.0, WIDE, "half")
    assert one.waves == 1.0 and one.idle < 1e-9
    assert more.total == pytest.approx(2 * one.total) and more.idle > 0.49 and more.last == "more"
    pairs = predict(roles * 2, 0.0, WIDE._replace(shared=98_304, registers=120), "half")
    assert pairs.places == 2 * PROCESSORS and pairs.total < 2 * one.total


def test_what_a_processor_holds_follows_registers_shared_memory_and_threads() -> None:
    assert [Resources(*made).occupancy for made in ((200, 0, 8), (128, 0, 8), (32, 0, 8), (32, 0, 1))] == [1, 2, 8, 32]
    assert [Resources(32, shared, 4).occupancy for shared in (147_456, 115_712, 98_304, 65_536)] == [1, 2, 2, 3]


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Any]]:
    """Rows of the script, in a process that does not interpret, and does not poison gigabytes."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = IMPORT_PATH
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_model.py"), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_every_launch_of_a_training_step_is_predicted(steps: list[dict[str, Any]]) -> None:
    for size in kernel_model.MODEL_SIZES:
        for dtype in kernel_model.MODEL_DTYPES:
            mine = [row for row in steps if (row["size"], row["dtype"]) == (size, dtype)]
            assert sum(not row["routed"] for row in mine) == 9, [row["kernel"] for row in mine]
            assert all(row["total"] >= 2.2 for row in mine)


LONGEST = {"small": 41, "medium": 335, "large": 9_200}
"""Microseconds that a step in bfloat16 may be predicted to take: a change that costs more says so here."""
IDLE = {"small": 0.6, "medium": 0.25, "large": 0.08}
"""Share of the time in which processors may have nothing to do, of weight gradients that their programs bound."""


@pytest.mark.parametrize("size", LONGEST)
def test_a_step_is_not_predicted_to_get_slower(size: str, steps: list[dict[str, Any]]) -> None:
    assert kernel_model.totals(steps)[size, "bfloat16"] <= LONGEST[size]


def test_the_library_is_taken_where_the_model_says_that_it_wins(steps: list[dict[str, Any]]) -> None:
    routed, alone = kernel_model.totals(steps), kernel_model.totals(steps, routed=False)
    for size, dtype in routed:
        taken = [row for row in steps if (row["size"], row["dtype"], row["kernel"]) == (size, dtype, "library")]
        if size == "small":
            assert not taken, "two launches more, for products of a few microseconds"
        else:
            assert len(taken) == 2 and routed[size, dtype] < alone[size, dtype]


def test_programs_stay_where_a_launch_has_large_tiles_of_halves(steps: list[dict[str, Any]]) -> None:
    staying = {
        (row["size"], row["dtype"], row["kernel"].removesuffix(PERSISTENT))
        for row in steps
        if row["kernel"].endswith(PERSISTENT)
    }
    kernels = ("grouped_linear_fwd", "grouped_data_grad")
    assert staying == {(size, "bfloat16", kernel) for size in ("medium", "large") for kernel in kernels}
    assert all(row["routed"] for row in steps if row["kernel"].endswith(PERSISTENT))


@pytest.mark.parametrize("size", IDLE)
def test_programs_of_weight_gradients_fill_their_waves(size: str, steps: list[dict[str, Any]]) -> None:
    mine = [
        row for row in steps
        if row["kernel"] == "grouped_weight_grad" and row["size"] == size and not row["routed"]
    ]  # fmt: skip
    assert len(mine) == 4
    for row in mine:
        assert row["bound"] in ("bytes", "launch") or row["idle"] <= IDLE[size], row


def test_the_page_shows_the_model_and_says_that_nothing_was_measured(steps: list[dict[str, Any]]) -> None:
    text = aot.PAGE.read_text(encoding="utf-8")
    found = quoted(text, kernel_model.BLOCK)
    assert found == kernel_model.summary(steps), (
        "render it again: .venv/bin/python benchmarks/kernel_model.py --write-page"
    )
    assert "no GPU has measured this" in found
