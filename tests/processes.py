"""Run a suite in several processes: ``python tests/processes.py --out FOLDER [--processes 16] [--minutes 8] -- ARGS``.

``ARGS`` go to pytest. The processes share the suite by ``tests/claims.py``; one that dies, or whose device answers no
more, is replaced, and the test it was at has failed. ``FOLDER/tests.json`` is written anew every few seconds, so
that a run that is stopped has said what it knew; failures are printed with their tracebacks as they come.

Exit code: 0 if all tests ran and none failed, 1 if some failed, 3 if none failed and the time was over before the last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 20
"""Failures that are printed with their tracebacks."""
LINES = 60
"""Of a traceback, its end."""
GRACE_S = 20.0
"""For tests that run when the time is over."""
MOST_STARTS = 8
"""Processes in all, for each that runs at a time."""
POLL_S = 0.5
WRITE_S = 5.0
TELL_S = 15.0


@dataclass
class Process:
    """One pytest, and what it has told."""

    number: int
    popen: subprocess.Popen[bytes]
    events: Path
    log: Path
    read: int = 0
    claimed: list[int] = field(default_factory=list)
    running: str | None = None
    chunk: int = 0
    is_over: bool = False


@dataclass
class Suite:
    """What is known of all tests."""

    outcomes: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    ended: dict[int, set[str]] = field(default_factory=dict)
    """Tests that are through, by chunk."""
    ids: list[str] = field(default_factory=list)
    digest: str | None = None
    deaths: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    """Tests that ran when the time was over."""
    shown: int = 0

    def note(self, name: str, outcome: str, seconds: float, text: str | None) -> None:
        """One phase of one test: the worst one counts."""
        rank = ("passed", "skipped", "failed")
        old = self.outcomes.get(name, "passed")
        self.outcomes[name] = max(old, outcome, key=rank.index)
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if text is None:
            return
        is_new = self.texts.get(name) != text  # every process reports what it could not collect
        self.texts[name] = text
        if outcome == "failed" and is_new and self.shown < SHOWN:
            self.shown += 1
            end = text.splitlines()[-LINES:]
            print(f"FAILED {name}", *end, "", sep="\n", flush=True)

    def named(self, outcome: str) -> list[str]:
        return sorted(name for name, found in self.outcomes.items() if found == outcome)

    def not_run(self) -> list[str]:
        return [name for name in self.ids if name not in self.outcomes]

    def write(self, path: Path, seconds: float) -> None:
        """All of it, whole or not at all."""
        skipped = Counter(self.texts[name] for name in self.named("skipped"))
        slowest = sorted(self.seconds, key=lambda name: -self.seconds[name])[:20]
        content = {
            "passed": len(self.named("passed")),
            "failed": [{"id": name, "text": self.texts[name]} for name in self.named("failed")],
            "skipped": dict(skipped.most_common()),
            "deaths": self.deaths,
            "stopped": self.stopped,
            "not_run": self.not_run(),
            "seconds": round(seconds, 1),
            "slowest": {name: round(self.seconds[name], 2) for name in slowest},
        }
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    def line(self) -> str:
        """How far it is."""
        counts = {outcome: len(self.named(outcome)) for outcome in ("passed", "failed", "skipped")}
        return ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + f", {len(self.not_run())} to run"

    def tell(self) -> None:
        """The end of the log."""
        print(self.line())
        for reason, count in Counter(self.texts[name] for name in self.named("skipped")).most_common():
            print(f"  skipped {count}: {reason}")
        for death in self.deaths:
            print(f"  {death}")
        for name in self.stopped:
            print(f"  stopped, because the time was over: {name}")
        for name in self.named("failed"):
            print(f"  FAILED {name}", flush=True)


class Run:
    """The processes, from the first to the last."""

    def __init__(self, folder: Path, processes: int, until: float, arguments: list[str]) -> None:
        self.folder, self.until, self.arguments = folder, until, arguments
        self.claims = folder / "claims"
        shutil.rmtree(self.claims, ignore_errors=True)
        self.claims.mkdir(parents=True)
        self.suite = Suite()
        self.count = processes
        self.started = 0
        self.alive = [self.start(number / processes) for number in range(processes)]

    def start(self, first: float) -> Process:
        """Another process, beginning somewhere in the suite."""
        number, self.started = self.started, self.started + 1
        log = self.folder / f"process-{number:03d}.log"
        command = [
            sys.executable, "-m", "pytest", "-p", "tests.claims", "-p", "no:cacheprovider", "-q", "--tb=short",
            "--claims", str(self.claims), "--worker", str(number), "--first", str(first), "--until", str(self.until),
            *self.arguments,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONFAULTHANDLER": "1"}
        path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "encoder"), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        with log.open("wb") as out:
            popen = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return Process(number, popen, self.claims / f"events-{number:03d}.jsonl", log)

    def listen(self, process: Process) -> None:
        """Take up what a process has told since."""
        if not process.events.is_file():
            return
        with process.events.open("rb") as file:
            file.seek(process.read)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        process.read += len(whole)
        for line in whole.splitlines():
            self.take(process, json.loads(line))

    def take(self, process: Process, event: dict[str, Any]) -> None:
        suite = self.suite
        if "ids" in event:
            if suite.digest not in (None, event["digest"]):
                raise SystemExit("the processes collected different tests: a name of a test depends on the process")
            suite.digest, suite.ids = event["digest"], event["ids"]
        elif "claim" in event:
            process.claimed.append(event["claim"])
        elif "start" in event:
            process.running, process.chunk = event["start"], event["chunk"]
        elif "end" in event:
            suite.ended.setdefault(process.chunk, set()).add(event["end"])
            process.running = None
        elif "broken" in event:
            process.running = event["broken"]
            suite.note(event["broken"], "failed", 0.0, suite.texts[event["broken"]] + "\nThe device answers no more.")
        elif "over" in event:
            process.is_over = True
        else:
            suite.note(event["id"], event["outcome"], event["seconds"], event.get("text"))

    def bury(self, process: Process) -> None:
        """Note a death, and let the others have the rest of what it had claimed."""
        code = process.popen.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        at = f" at {process.running}" if process.running else ""
        self.suite.deaths.append(f"process {process.number}: {how}{at}")
        end = process.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:]
        print(f"process {process.number} died ({how}){at}", *end, "", sep="\n", flush=True)
        if process.running is not None:
            if self.suite.outcomes.get(process.running) != "failed":
                self.suite.note(process.running, "failed", 0.0, f"the process died: {how}")
            self.suite.ended.setdefault(process.chunk, set()).add(process.running)
        for chunk in process.claimed:
            ended = sorted(self.suite.ended.get(chunk, ()))
            (self.claims / f"done-{chunk:05d}").write_text("\n".join(ended), encoding="utf-8")
            (self.claims / f"chunk-{chunk:05d}").unlink()

    def watch(self) -> None:
        """Until all are through, or the time and the grace are over."""
        begin = wrote = told = time.monotonic()
        path = self.folder / "tests.json"
        while self.alive:
            time.sleep(POLL_S)
            for process in list(self.alive):
                has_ended = process.popen.poll() is not None
                self.listen(process)
                if not has_ended:
                    continue
                self.alive.remove(process)
                if not process.is_over:
                    self.bury(process)
                    # One that dies before its first test would die again.
                    if process.claimed and self.started < MOST_STARTS * self.count and time.time() < self.until:
                        self.alive.append(self.start(len(self.suite.outcomes) / max(1, len(self.suite.ids))))
            now = time.monotonic()
            if now - wrote > WRITE_S:
                self.suite.write(path, now - begin)
                wrote = now
            if now - told > TELL_S:
                print(f"{now - begin:.0f} s: {self.suite.line()}", flush=True)
                told = now
            if time.time() > self.until + GRACE_S:
                break
        self.stop()
        self.suite.write(path, time.monotonic() - begin)

    def stop(self) -> None:
        """End what still runs; its test was not finished."""
        for process in self.alive:
            self.listen(process)
            if process.popen.poll() is None:
                if process.running is not None:
                    self.suite.stopped.append(process.running)
                process.popen.kill()
                process.popen.wait()
        self.alive = []


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    cut = given.index("--") if "--" in given else len(given)
    own, rest = given[:cut], given[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results and logs")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=8.0, help="start no test after so many minutes")
    options = parser.parse_args(own)
    if options.processes < 1:
        parser.error(f"--processes: expected 1 or more, got {options.processes}")
    run = Run(options.out.resolve(), options.processes, time.time() + 60 * options.minutes, rest)

    begin = time.monotonic()
    try:
        run.watch()
    finally:
        run.stop()
        run.suite.write(run.folder / "tests.json", time.monotonic() - begin)
        run.suite.tell()
    suite = run.suite
    if not suite.ids:
        print("no test was collected")
        return 1
    if suite.named("failed") or suite.deaths:
        return 1
    return 3 if suite.not_run() else 0


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
