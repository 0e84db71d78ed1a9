"""Eight threads that serve, while another one trains another model: every result is, bit for bit, the serial one."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ple_fast import use_backend
from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, MultiTaskModel, Numeric
from ple_fast_encoder import Column

SERVING = 8
JOBS = 6
"""Of each serving thread in a round, which is one trial."""
ROWS = 300
TRUNKS: dict[str, tuple[str, dict[str, Any]]] = {
    "batch norm": ("ple", {"norm": "batch", "gate_units": (6,)}),
    "dropout": ("ple", {"dropout": 0.5, "task_experts": 1}),
    "everything": ("mmoe", {"norm": "batch", "dropout": 0.3, "activation": "dice", "experts": 3}),
    "groups": ("home", {"groups": ((0,), (1,)), "task_experts": (1, 2), "feature_gate_rank": 4}),
    "layer norm": ("adatt", {"norm": "layer", "activation": "gelu", "recompute": True}),
    "embeddings of tasks": ("stem", {"num_levels": 2, "dropout": 0.2}),
}
Job = Callable[[], list[Tensor]]


def make_model(trunk: str, seed: int) -> MultiTaskModel:
    """A small model in train mode, its statistics away from their start."""
    torch.manual_seed(seed)
    kind, options = TRUNKS[trunk]
    columns: list[Column] = [Categorical("a", size=20, width=4), Categorical("b", size=7, width=4), Numeric("n")]
    tasks = [TaskLoss("click"), TaskLoss("amount", kind="regression")]
    model = MultiTaskModel(
        columns,
        tasks,
        trunk=kind,
        trunk_options={**options, "expert_units": (12, 8)},
        task_embeddings=kind == "stem",
        sparse_embeddings=kind == "stem",
    )
    model.fit(*make_data(seed), batch_size=64, progress=False)
    return model.train()


def make_data(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns and labels."""
    generator = np.random.default_rng(seed)
    columns = {"a": generator.integers(0, 20, ROWS), "b": generator.integers(0, 7, ROWS)}
    labels = {"click": generator.integers(0, 2, ROWS), "amount": generator.normal(size=ROWS)}
    return columns | {"n": generator.normal(size=ROWS)}, labels


def jobs_of(name: str, model: MultiTaskModel, data: dict[str, Any]) -> dict[str, Job]:
    """Every way to serve a model, each of which reads it and nothing else."""
    rows = model.encode(data)
    served = copy.deepcopy(model).eval()
    for_inference: Any = copy.deepcopy(model.trunk).for_inference()  # type: ignore[operator]  # a trunk of ours
    with torch.inference_mode():
        features = served._features(rows)

    def predict(size: int) -> list[Tensor]:
        return [torch.from_numpy(part) for part in model.predict(rows, batch_size=size).values()]

    def gates() -> list[Tensor]:
        return [weight for level in model.gate_weights(rows, batch_size=100) for weight in level]

    def forward() -> list[Tensor]:
        with torch.inference_mode():
            return list(served(rows).values())

    def trunk(module: nn.Module, part: slice) -> list[Tensor]:
        with torch.inference_mode():
            return [module(features[part])]

    def under_autocast() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return forward() + predict(ROWS)

    def backend() -> list[Tensor]:
        with use_backend("torch"):
            return forward() + gates()

    jobs: dict[str, Job] = {
        "predict": lambda: predict(ROWS),
        "predict in batches": lambda: predict(64),
        "gate_weights": gates,
        "forward": forward,
        "for_inference": lambda: trunk(for_inference, slice(None)),
        "few rows": lambda: trunk(served.trunk, slice(0, 3)),
        "autocast": under_autocast,
        "use_backend": backend,
    }
    return {f"{way} of {name!r}": job for way, job in jobs.items()}


def train(seed: int) -> list[Tensor]:
    """Weights of a model after an epoch, and of a trunk after some steps under autocast."""
    name = sorted(TRUNKS)[seed % len(TRUNKS)]
    model = make_model(name, seed)
    data, labels = make_data(seed + 1)
    model.fit(data, labels, batch_size=50, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = model.encode(data)
    for start in range(0, ROWS, 60):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(rows.rows(slice(start, start + 60)))
            loss = torch.stack([output.float().square().mean() for output in outputs.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


class State:
    """Modes, parameters and buffers of a model, to see that reading left them alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modes = [module.training for module in model.modules()]
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def moved(self) -> list[str]:
        """What is not as it was, put back."""
        flipped = [
            (module, mode)
            for module, mode in zip(self.model.modules(), self.modes, strict=True)
            if module.training != mode
        ]
        for module, mode in flipped:
            module.training = mode
        found = [f"the mode of {len(flipped)} modules"] if flipped else []
        now = self.model.state_dict()
        for name, tensor in self.tensors.items():
            if not torch.equal(now[name], tensor):
                found.append(name)
                now[name].copy_(tensor)
        return found


def differs(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether any bit does."""
    return len(found) != len(expected) or not all(map(torch.equal, found, expected))


def run(seed: int, trials: int, figures: dict[str, Any]) -> Iterator[str | None]:
    """One round of all threads per trial."""
    models = {name: make_model(name, seed) for name in TRUNKS}
    jobs: dict[str, Job] = {}
    for number, (name, model) in enumerate(models.items()):
        jobs |= jobs_of(name, model, make_data(seed + 10 + number)[0])
    states = {name: State(model) for name, model in models.items()}
    expected = {name: job() for name, job in jobs.items()}
    figures.update(threads=SERVING + 1, calls=0, trained=0)
    # A thread has its own number of threads to divide work among, and sums depend on it.
    with ThreadPoolExecutor(SERVING + 1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for number in range(seed, seed + trials):
            wrong = [f"{name} moved when nothing else ran" for name in _moved(states)] if number == seed else []
            trained = train(number)
            start = threading.Barrier(SERVING + 1)
            trainer = pool.submit(partial(_trained, start, number))
            servers = [pool.submit(_serve, start, number * SERVING + i, jobs, expected) for i in range(SERVING)]
            for server in servers:
                wrong += server.result()
            figures["calls"] += SERVING * JOBS
            figures["trained"] += 1
            if differs(trainer.result(), trained):
                wrong.append("the model that was trained meanwhile has other weights")
            wrong += [f"{name} moved" for name in _moved(states)]
            again = f"\n  again: python -m soak --only threads --seed {number}"
            yield f"round {number}: {'; '.join(sorted(set(wrong)))}{again}" if wrong else None


def _moved(states: dict[str, State]) -> list[str]:
    return [f"{part} of {name!r}" for name, state in states.items() for part in state.moved()]


def _trained(start: threading.Barrier, seed: int) -> list[Tensor]:
    start.wait()
    return train(seed)


def _serve(start: threading.Barrier, seed: int, jobs: dict[str, Job], expected: dict[str, list[Tensor]]) -> list[str]:
    """What was wrong of some jobs in random order."""
    names = random.Random(seed).sample(sorted(jobs), JOBS)
    start.wait()
    wrong = []
    for name in names:
        try:
            if differs(jobs[name](), expected[name]):
                wrong.append(f"{name} differs")
        except Exception as error:  # whatever is raised is a failure to be told
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    return wrong
