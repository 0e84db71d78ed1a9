"""Whole models of the libraries, embeddings to optimizer, as they are and accelerated, each eager and compiled.

The library's own class is trained as its users train it; the accelerated one is a copy of it after
``ple_fast.accelerate``. Nothing is timed before both have given the same loss and the same outputs.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ple_fast
from benchmarks.configs import KUAIRAND, SEED, Mode, ModelConfig
from benchmarks.peers import import_deepctr
from benchmarks.steps import WrongResultError

TOLERANCE = 1e-4
"""Relative, in float32, of outputs and loss."""
VARIANTS = ("original", "original/compiled", "accelerated", "accelerated/compiled")
QUICK_VARIANTS = ("original", "accelerated")


@dataclass(frozen=True)
class Whole:
    """A library's model. ``arguments``: of its forward, from ids ``(B, fields)``."""

    build: Callable[[ModelConfig], Any]
    arguments: Callable[[ModelConfig, Tensor], tuple[Any, ...]]
    requires: str
    """The package that is imported."""

    def available(self) -> bool:
        """Whether the library is installed."""
        return importlib.util.find_spec(self.requires) is not None


def _rechub(config: ModelConfig) -> Any:
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.multi_task import PLE

    features = [SparseFeature(name, vocab_size=size, embed_dim=config.width) for name, size in config.fields]
    return PLE(
        features, ["classification"] * config.num_tasks, config.num_levels, config.task_experts, config.shared_experts,
        {"dims": list(config.units), "activation": "relu"}, [{"dims": list(config.tower_units)}] * config.num_tasks,
    )  # fmt: skip


def _deepctr(config: ModelConfig) -> Any:
    ple = import_deepctr()
    from deepctr_torch.inputs import SparseFeat

    names = [f"task{t}" for t in range(config.num_tasks)]
    return ple(
        [SparseFeat(name, vocabulary_size=size, embedding_dim=config.width) for name, size in config.fields],
        shared_expert_num=config.shared_experts, specific_expert_num=config.task_experts,
        num_levels=config.num_levels, expert_dnn_hidden_units=config.units, gate_dnn_hidden_units=(),
        tower_dnn_hidden_units=config.tower_units, task_types=["binary"] * config.num_tasks, task_names=names,
        l2_reg_embedding=0.0, init_std=0.05,
    )  # fmt: skip


LIBRARIES: dict[str, Whole] = {
    "torch-rechub": Whole(
        _rechub, lambda c, ids: (dict(zip((name for name, _ in c.fields), ids.unbind(1), strict=True)),), "torch_rechub"
    ),
    "DeepCTR-Torch": Whole(_deepctr, lambda c, ids: (ids.float(),), "deepctr_torch"),
}


def _data(config: ModelConfig, batch: int) -> tuple[Tensor, Tensor]:
    """Ids ``(B, fields)`` and labels ``(B, T)``, seeded."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.stack([torch.randint(0, size, (batch,), generator=generator) for _, size in config.fields], dim=1)
    labels = torch.randint(0, 2, (batch, config.num_tasks), generator=generator).float()
    return ids, labels


def _step(model: Any, run: Any, arguments: tuple[Any, ...], labels: Tensor, mode: Mode) -> Callable[[], Tensor]:
    if mode == "inference":
        model.eval()

        def infer() -> Tensor:
            with torch.inference_mode():
                out: Tensor = run(*arguments)
            return out

        return infer
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.binary_cross_entropy(run(*arguments), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


def make_steps(
    library: str, mode: Mode, batch: int, variants: tuple[str, ...] = VARIANTS, config: ModelConfig = KUAIRAND
) -> dict[str, Callable[[], object]]:
    """A callable per variant: a training step with optimizer, or inference.

    Raises:
        WrongResultError: a variant's first result differs from that of the original.
    """
    whole = LIBRARIES[library]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        original: nn.Module = whole.build(config)
    ids, labels = _data(config, batch)
    arguments = whole.arguments(config, ids)
    steps: dict[str, Callable[[], object]] = {}
    expected: Tensor | None = None
    for variant in variants:
        name, _, compiled = variant.partition("/")
        model = copy.deepcopy(original)
        if name == "accelerated":
            ple_fast.accelerate(model, strict=True)
        step = _step(model, torch.compile(model, dynamic=False) if compiled else model, arguments, labels, mode)
        first = step()
        expected = first if expected is None else expected
        if float((first - expected).norm()) > TOLERANCE * float(expected.norm()):
            raise WrongResultError(f"{library}, {variant}, {mode} at {batch}: the first result differs")
        steps[variant] = step
    return steps
