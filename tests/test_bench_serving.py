"""The load of benchmarks/serving.py: arrivals that wait for nobody, rates that a server of known speed can take."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import result_files, serving, serving_report
from benchmarks.steps import WrongResultError

REQUEST: Any = [(None, None)]


def sleeps(seconds: float) -> serving.Serve:
    return lambda codes, numbers: time.sleep(seconds)


def test_what_waits_in_the_queue_counts() -> None:
    """Requests of 10 ms at 150 per second to one thread: the last ones have waited for all that came before."""
    trial = serving.run_trial(sleeps(0.010), REQUEST, 1, rate=150.0, seconds=0.4)
    assert len(trial.latencies) == 60 and not trial.is_late
    assert trial.latencies[-1] > 0.1 and trial.percentile(0.99) > 0.1
    idle = serving.run_trial(sleeps(0.010), REQUEST, 8, rate=20.0, seconds=1.0)
    assert 0.010 <= idle.percentile(0.5) < 0.05


def test_a_server_that_falls_behind_is_given_up() -> None:
    begin = time.perf_counter()
    trial = serving.run_trial(sleeps(0.02), REQUEST, 2, rate=2000.0, seconds=10.0)
    assert trial.is_late and trial.percentile(0.5) == float("inf")
    assert time.perf_counter() - begin < 5


def test_all_threads_serve_and_each_request_is_answered_once() -> None:
    seen, names = [], set()

    def serve(codes: Any, numbers: Any) -> None:
        time.sleep(0.005)
        seen.append(codes)
        names.add(threading.get_ident())

    requests: Any = [(number, None) for number in range(1000)]
    serving.run_trial(serve, requests, 4, rate=500.0, seconds=0.2)
    warm = sorted([*range(serving.WARM_UP)] * 4)  # each thread answers these before
    assert sorted(seen) == sorted([*range(100), *warm]) and len(names) == 4


def test_an_error_of_a_server_ends_the_trial() -> None:
    def fails(codes: Any, numbers: Any) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        serving.run_trial(fails, REQUEST, 2, rate=1000.0, seconds=0.1)


def test_the_rate_at_the_limit_is_what_a_server_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "LIMIT_S", 0.2)  # so that a machine that is busy is not what is measured
    assert 5 < serving.rate_at_limit(sleeps(0.001), REQUEST, 1, seconds=0.2) < 1100
    assert serving.rate_at_limit(sleeps(0.25), REQUEST, 1, seconds=0.1) == 0, "no request is that fast"


def test_contestants_that_predict_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = serving.make_contestants((serving.EAGER, serving.LOOP, serving.NOTHING), tmp_path, (1, 5))
    assert list(made) == [serving.EAGER, serving.LOOP, serving.NOTHING]
    ways = serving.one_row(made)
    assert all(value > 0 for value in ways.values()) and "encoder.rows and loop" in ways
    wrong = dict.fromkeys(serving.TASKS, 0.5)
    monkeypatch.setattr(serving, "_in_torch", lambda served: lambda codes, numbers: wrong)
    with pytest.raises(WrongResultError, match="eager, 1 rows: the predictions of 'income' differ"):
        serving.make_contestants((serving.EAGER,), tmp_path, (1,))


def test_the_program_writes_its_file_and_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "SEARCH_TRIALS", 2)
    monkeypatch.setattr(serving, "LEAST_TRIAL_S", 0.05)
    monkeypatch.setattr(serving, "CPU_ROUNDS", 1)
    monkeypatch.setattr(serving, "LIMIT_S", 10.0)
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmark:serving -->\n<!-- /benchmark:serving -->\n", encoding="utf-8")
    monkeypatch.setattr(serving, "PAGE", page)
    file = tmp_path / "machine" / "serving.json"
    options = ["--minutes", "0", "--contestants", "eager,loop,nothing", "--rows", "1,3", "--threads", "2"]
    serving.main([*options, "--json", str(file)])
    found = result_files.read(file, "serving")
    assert [(entry["rows"], entry["threads"]) for entry in found["results"]] == [(1, 2), (3, 2)]
    for entry in found["results"]:
        assert [len(own["rates"]) for own in entry["contestants"].values()] == [2, 2, 2]
        eager, loop, nothing = entry["contestants"].values()
        assert eager["rate_at_limit"] > 0 and nothing["rate_at_limit"] is None
        assert [t["rate"] for t in eager["rates"]] == [t["rate"] for t in loop["rates"]]
    said = capsys.readouterr().out
    assert "| rows | threads |" in said and "| predict, a frame |" in said
    serving.main(["--write-page", "--json", str(file)])
    assert serving_report.serving_block("machine", found) in page.read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        serving.main(["--contestants", "eager"])
