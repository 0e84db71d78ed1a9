"""When skipping experts would pay: ``python benchmarks/routing.py [--rounds N] [--json PATH]``.

A level whose gates choose (``top_k``, ``joint_k``), as ours computes it, every expert for every row, against one that
computes for each row only the experts that some gate chooses: pairs of row and expert sorted by expert, rows gathered,
a product per expert, and the results added up per task. By the number of experts, in inference and in a training step.
Nothing is timed before both have given the same output and gradients.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import result_files
from benchmarks.configs import ROUNDS, ROUTING, ROUTING_EXPERTS, SEED, RoutingConfig
from benchmarks.environment import ROOT, machine_name
from benchmarks.paired import Paired, time_paired
from benchmarks.steps import WrongResultError
from ple_fast import ExtractionNetwork, GateSpec, MLPSpec, Topology
from ple_fast.torch_backend.top_k import keep_joint

MODES = ("train", "inference")
CONTESTANTS = ("dense", "routed")
TOLERANCE = 1e-4
"""Of the largest value."""


def make_level(config: RoutingConfig, experts: int) -> ExtractionNetwork:
    """MMoE whose gates choose, from seeded weights."""
    torch.manual_seed(SEED)
    return ExtractionNetwork(
        config.in_features,
        Topology.mmoe(config.num_tasks, experts),
        experts=MLPSpec(config.units),
        gate=GateSpec(top_k=config.top_k, joint_k=config.joint_k),
    )


def weights_of(level: ExtractionNetwork, x: Tensor) -> Tensor:
    """Of all gates, ``(B, T, E)``."""
    topology, gate = level.topology, level.gate
    assert gate.weight is not None and gate.bias is not None
    logits = F.linear(x, gate.weight, gate.bias).view(-1, topology.num_mixtures, topology.num_experts)
    top_k = level.gate_spec.top_k
    assert top_k is not None
    return torch.softmax(keep_joint(logits, top_k, level.gate_spec.joint_k, None), dim=2)


@torch.no_grad()
def without_ties(level: ExtractionNetwork, x: Tensor) -> Tensor:
    """``x``, with its first row where rounding decides which expert a gate chooses, and the two would differ."""
    listed = torch.stack(level(x, return_gates=True)[1], 1)
    differ = ((listed > 0) != (weights_of(level, x) > 0)).flatten(1).any(1)
    return torch.where(differ.unsqueeze(1), x[:1], x)


def routed(level: ExtractionNetwork, x: Tensor) -> Tensor:
    """What the level computes, ``(B, T, H)``, from the experts alone that a row reads."""
    weights = weights_of(level, x)
    used = (weights > 0).any(1)
    experts, rows = used.t().nonzero(as_tuple=True)  # by expert
    counts = used.sum(0).tolist()
    a = x.index_select(0, rows)
    (block,) = level.blocks
    for layer in block.layers:  # type: ignore[union-attr]  # of the block
        own = zip(a.split(counts), layer.weight, layer.bias, strict=True)
        a = F.relu(torch.cat([F.linear(part, weight, bias) for part, weight, bias in own]))
    pairs = weights[rows, :, experts].unsqueeze(2) * a.unsqueeze(1)
    return pairs.new_zeros(x.shape[0], *pairs.shape[1:]).index_add(0, rows, pairs)


def steps_of(config: RoutingConfig, experts: int) -> tuple[dict[str, Callable[[], object]], float]:
    """A step by mode and contestant, checked; and how many experts a row reads in the mean.

    Raises:
        WrongResultError: the two do not compute the same.
    """
    level = make_level(config, experts)
    generator = torch.Generator().manual_seed(SEED)
    x = without_ties(level, torch.randn(config.batch, config.in_features, generator=generator))
    dy = torch.randn(config.batch, config.num_tasks, config.units[-1], generator=generator)
    forward: dict[str, Callable[[Tensor], Tensor]] = {"dense": level, "routed": lambda own: routed(level, own)}
    parameters = list(level.parameters())

    def train(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        own = x.detach().requires_grad_()
        y = run(own)
        return [y, *torch.autograd.grad(y, [own, *parameters], dy)]

    @torch.inference_mode()
    def infer(run: Callable[[Tensor], Tensor]) -> Tensor:
        return run(x)

    for ours, theirs in zip(*(train(run) for run in forward.values()), strict=True):
        error = (ours - theirs).detach().abs().max() / ours.detach().abs().max().clamp(min=1e-12)
        if not error <= TOLERANCE:
            raise WrongResultError(f"{experts} experts: dense and routed differ by {float(error):.2g}")
    steps: dict[str, Callable[[], object]] = {}
    for name, run in forward.items():
        steps[f"train {name}"] = lambda run=run: train(run)  # type: ignore[misc]  # the default binds it
        steps[f"inference {name}"] = lambda run=run: infer(run)  # type: ignore[misc]
    with torch.no_grad():
        read = float((weights_of(level, x) > 0).any(1).sum(1).double().mean())
    return steps, round(read, 2)


def entry(config: RoutingConfig, experts: int, read: float, paired: Paired) -> list[dict[str, Any]]:
    """Of a result file: per mode the times, and how many times as long the dense level takes."""
    found = []
    for mode in MODES:
        times = {name: paired.times(f"{mode} {name}") for name in CONTESTANTS}
        gain = paired.ratio(f"{mode} dense", f"{mode} routed")
        found.append(
            {
                "mode": mode, "experts": experts, "read_per_row": read, "batch": config.batch,
                "in_features": config.in_features, "units": list(config.units), "tasks": config.num_tasks,
                "top_k": config.top_k, "joint_k": config.joint_k, **paired.about(), "contestants": times,
                "dense_over_routed": gain,
            }
        )  # fmt: skip
    return found


def measure(
    config: RoutingConfig = ROUTING, experts: Sequence[int] = ROUTING_EXPERTS, *, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """Entries by the number of experts."""
    found = []
    for count in experts:
        steps, read = steps_of(config, count)
        found += entry(config, count, read, time_paired(steps, rounds=rounds))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="default benchmarks/results/<machine>/routing.json")
    options = parser.parse_args(arguments)
    results = measure(rounds=options.rounds)
    for own in results:
        times = ", ".join(f"{name} {own['contestants'][name]['median_ms']:.4g} ms" for name in CONTESTANTS)
        print(f"{own['experts']} experts, {own['read_per_row']} read, {own['mode']}: {times}")
    path = options.json or ROOT / "benchmarks" / "results" / machine_name() / "routing.json"
    result_files.write(path, "routing", {"results": results})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
