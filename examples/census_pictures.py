"""The two pictures of a run of ``census_income.py``, from the file of figures that it wrote: nothing is trained.

Usage: python examples/census_pictures.py [FILE] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

from ple_fast.viz import GateUse, plot_gate_use, plot_scores

AUC, GATES = "census_auc.png", "census_gates.png"


def draw(content: Mapping[str, Any], out: Path) -> list[Path]:
    """AUC per model, and the weights of the gates of the models that have gates; both say of how many rows and seeds.

    Returns:
        The files: the second one only where the file of figures has gates.
    """
    out.mkdir(parents=True, exist_ok=True)
    scores = {row["model"]: row["auc"] for row in content["results"]}
    train, test = f"{content['rows']['train']:,} training rows", f"{content['rows']['test']:,} test rows"
    seeds = max(len(runs) for auc in scores.values() for runs in auc.values())
    about = f"{seeds} seeds" if seeds > 1 else "one seed"
    files = [out / AUC]
    plot_scores(scores, title=f"Census-Income: AUC on {test}, {about}, {train}", path=files[0])
    uses = [GateUse(**{key: _tuples(value) for key, value in gate.items()}) for gate in content["gates"]]
    if uses:
        files.append(out / GATES)
        first = "first seed" if seeds > 1 else "one seed"
        plot_gate_use(
            uses, title=f"Census-Income: expert utilisation per gate, test data, {first}, {train}", path=files[1]
        )
    return files


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def main(argv: Sequence[str] | None = None) -> None:
    """Reads, draws, says where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "file", type=Path, nargs="?", default=Path("out/census_income.json"), help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the pictures (default: %(default)s)")
    options = parser.parse_args(argv)
    for file in draw(json.loads(options.file.read_text(encoding="utf-8")), options.out):
        print(f"Wrote {file}")


if __name__ == "__main__":
    main()
