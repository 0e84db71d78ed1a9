"""``python -m ple_fast.tune --device cpu``: what is timed, the table that follows, the file, and what it shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ple_fast import tune, tune_processor
from ple_fast.torch_backend import products
from ple_fast.torch_backend.product_files import read_table
from ple_fast.torch_backend.product_table import DEFAULT, WAYS
from ple_fast.torch_backend.table_in_use import table
from ple_fast.tune_products import Product, Samples, fastest, rows_of_table
from tests.programs import run_python

TINY = {"in_features": 6, "num_tasks": 2, "task_experts": 1, "shared_experts": 1, "expert_units": [5, 4]}


class Clock:
    """Ways tell it how long they take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def way(self, seconds: float) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            self.now += seconds
            return x

        return run


def test_every_way_takes_its_turn_and_what_has_lost_is_left() -> None:
    clock = Clock()
    samples = Samples(clock)
    x, shape = torch.zeros(1), (7, 1, 4, 5)
    ways: products.Ways = {"mm": clock.way(3.0), "onednn": clock.way(1.0), "slow": clock.way(50.0)}
    for _ in range(40):
        assert samples("linear", shape, ways, (x,)) is x
    seconds = samples.seconds[Product("float32", "linear", *shape)]
    assert len(seconds["slow"]) == 1, "it takes more than four times the least"
    assert abs(len(seconds["mm"]) - len(seconds["onednn"])) <= 1
    assert not samples.enough(50) and samples.enough(8)
    assert samples.medians() == {Product("float32", "linear", *shape): {"mm": 3.0, "onednn": 1.0, "slow": 50.0}}


def test_a_product_that_came_too_seldom_says_nothing() -> None:
    clock = Clock()
    samples = Samples(clock)
    samples("linear", (7, 1, 4, 5), {"mm": clock.way(1.0), "onednn": clock.way(1.0)}, (torch.zeros(1),))
    assert samples.medians() == {} and not samples.enough(1)


def test_another_way_must_win_by_more_than_noise() -> None:
    assert fastest({"mm": 1.0, "onednn": 0.98}, "linear") == "mm"
    assert fastest({"mm": 1.0, "onednn": 0.9}, "linear") == "onednn"
    assert fastest({"batched": 2.0, "turned": 1.0}, "grouped_weight_grad") == "turned"


def test_borders_lie_between_the_rows_that_were_measured() -> None:
    def measured(rows: int, way: str) -> tuple[Product, dict[str, float]]:
        seconds = {name: 1.0 if name == way else 2.0 for name in WAYS["linear"]}
        return Product("float32", "linear", rows, 1, 4, 5), seconds

    found = rows_of_table(
        dict(measured(rows, way) for rows, way in ((400, "onednn"), (16, "mm"), (100, "mm"), (1600, "mm"))),
        ("float32", "bfloat16"),
    )
    assert found == {("float32", "linear"): ((1, 4, 5, ((0, "mm"), (200, "onednn"), (800, "mm"))),)}


@pytest.mark.parametrize(
    ("gains", "limit"),
    [((-0.2, -0.1, 0.1, 0.3), 4), ((-0.2, 0.1, -0.05, 0.3), 2), ((0.1, 0.1, 0.1, 0.1), 1), ((0.5, 0.1, 0.1, -1.0), 9)],
)
def test_a_limit_is_where_all_steps_together_take_the_least(gains: tuple[float, ...], limit: int) -> None:
    assert tune_processor.best_limit((1, 2, 4, 8), gains) == limit


@pytest.mark.parametrize(("slower", "expected"), [(0.5, True), (2.0, False), (1.0, False)])
def test_a_table_is_kept_if_steps_take_less_with_it(
    slower: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = DEFAULT._replace(source="new")
    monkeypatch.setattr(tune_processor, "_step", lambda *about, **how: None)
    monkeypatch.setattr(tune_processor, "_seconds", lambda step: slower if table().source == "new" else 1.0)
    assert tune_processor.is_faster(found, [TINY], ["float32"], lambda text, share: None) == expected


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_processor, "ROWS", (3, 120))
    monkeypatch.setattr(tune_processor, "SAMPLES", 1)
    monkeypatch.setattr(tune_processor, "LIMIT_ROUNDS", 1)
    monkeypatch.setattr(tune_processor, "BLOCK_ROWS", (1100,))
    monkeypatch.setattr(tune_processor, "FEW", (4, 8))
    monkeypatch.setattr(tune_processor, "WIDE", (2, 4))


@pytest.mark.usefixtures("quick")
def test_the_command_writes_a_table_that_the_library_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PLE_FAST_PRODUCTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trunk = tmp_path / "trunk.json"
    trunk.write_text(json.dumps({**TINY, "batch": 9}), encoding="utf-8")
    monkeypatch.setattr(tune_processor, "CHECKED_ROWS", (3,))
    monkeypatch.setattr(tune_processor, "WORTH", 1e9)
    tune.main(["--device", "cpu", "--trunk", str(trunk), "--dtype", "float32"])
    assert "nothing is written" in capsys.readouterr().out
    assert not (tmp_path / "ple_fast").exists()
    monkeypatch.setattr(tune_processor, "WORTH", -1e9)
    tune.main(["--device", "cpu", "--trunk", str(trunk), "--dtype", "float32"])
    said = capsys.readouterr()
    (path,) = (tmp_path / "ple_fast").iterdir()
    assert f"wrote {path}" in said.out and "float32 grouped: 3 x (5 -> 4):" in said.out
    assert "the table in use against the new one" in said.err
    _, threads, found = read_table(path)
    assert threads == torch.get_num_threads()
    assert {dtype for dtype, _ in found.products} == {"float32"}
    assert {kind for _, kind in found.products} == set(WAYS)
    assert table().source == str(path)
    tune.main(["--show", "--device", "cpu"])
    shown = capsys.readouterr().out
    assert f"table: {path}" in shown and "float32 linear: 1 x (6 -> " in shown
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["trunks"] == [{**TINY, "batch": 9}]


@pytest.mark.usefixtures("quick")
def test_the_table_in_use_is_the_same_after_a_measurement_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    before = table()

    def fail(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_processor, "measure_limits", fail)
    with pytest.raises(KeyboardInterrupt):
        tune_processor.measure([TINY], ["float32"], 0.1, lambda text, share: None)
    assert table() is before and products._watcher is None


def test_half_precision_is_measured_where_the_processor_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_processor, "onednn_takes", lambda dtype: dtype != torch.float16)
    assert tune_processor.dtypes_here() == ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--minutes", "soon"], "invalid float value"),
        (["--device", "cpu", "--threads", "0"], "--threads: expected 1 or more"),
        (["--device", "cpu", "--trunk", "huge"], "expected one of small, medium, large, or a JSON file"),
        (["--show", "--device", "cuda"], "PyTorch sees no GPU here"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert message in capsys.readouterr().err


def test_what_is_shown_without_a_bar_is_a_line_each() -> None:
    program = (
        "import sys; sys.modules['rich'] = None; sys.modules['rich.console'] = None\n"
        "from ple_fast.tune_show import progress\n"
        "with progress() as say: say('half of it', 0.5)"
    )
    done = run_python("-c", program)
    assert not done.returncode, done.stderr
    assert done.stderr == " 50 %  half of it\n"
