"""One of two equal models from beginning to end: accelerated, trained and restored, or the library's own all along."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ple_fast import Report, accelerate, restore
from soak.swap_changes import change
from soak.swap_models import tensors_in
from soak.swap_places import Subject, sites_of
from soak.swap_trials import AROUND, OPTIMIZERS, REFUSALS, Trial
from tests.swap_proof import shaken

Values = dict[str, Any]


class Side:
    """One of the two models, with its optimizers."""

    def __init__(self, trial: Trial, shake: int | None = None) -> None:
        self.trial = trial
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trial.seed)
            model = shaken(trial.model.make()).to(trial.dtype)
        if shake is not None:
            _shake(model, shake)
        self.subject = Subject(model)
        change(self.subject, random.Random(f"changes {trial.seed}"), list(trial.changes))
        self.model = model
        sites = sites_of(model)
        self.part: nn.Module = model
        """What is accelerated."""
        if trial.part and sites:
            path = random.Random(f"part {trial.seed}").choice(sites)[0]
            self.part = model.get_submodule(path.rpartition(".")[0])
        self.optimizers, self.unknown = self._optimizers()

    def _optimizers(self) -> tuple[list[Optimizer], list[Optimizer]]:
        """Those that ``accelerate`` is told of, and others."""
        trial, make, model = self.trial, OPTIMIZERS[self.trial.optimizer], self.model
        named: list[tuple[str, nn.Parameter]] = list(model.named_parameters())
        trunk = {id(p) for _, site, _ in sites_of(model) for p in site.parameters()}
        dice = random.Random(f"groups {trial.seed}")
        apart: dict[str, Callable[[str, nn.Parameter], bool]] = {
            "trunk apart": lambda name, p: id(p) in trunk,
            "by dimensions": lambda name, p: p.dim() < 2,
            "some": lambda name, p: dice.random() < 0.2,
            "two optimizers": lambda name, p: id(p) in trunk,
        }
        rule = apart.get(trial.groups)
        chosen = {name for name, p in named if rule is not None and rule(name, p)}
        rows = [[row for row in named if (row[0] in chosen) is own] for own in (False, True)]
        rows = [row if trial.named else [p for _, p in row] for row in rows if row]  # type: ignore[misc]
        if trial.groups == "two optimizers":
            return [make(row) for row in rows], []
        if trial.groups == "some":
            return [make(rows[0])], []
        made = make([{"params": row, "lr": 0.01 * (i + 1)} for i, row in enumerate(rows)] if len(rows) > 1 else rows[0])
        return ([], [made]) if trial.groups == "not passed" else ([made], [])

    def step(self, number: int, values: Values) -> None:
        """A training step; outputs and gradients of inputs and of what keeps its name go to ``values``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.trial.seed + number)
            arguments = self.trial.model.batch(self.trial.rows, self.trial.dtype)
        leaves = [leaf.requires_grad_() for leaf in tensors_in(arguments) if leaf.is_floating_point()]
        outputs = tensors_in(self.model(*arguments))
        generator = torch.Generator().manual_seed(number)
        losses = [(out - torch.rand(out.shape, generator=generator).to(out)).square().mean() for out in outputs]
        losses += [0.1 * penalty(self.model) for penalty in self.subject.penalties]
        module: Any
        for module in self.model.modules():
            if hasattr(module, "get_regularization_loss"):
                losses.append(module.get_regularization_loss().sum())
        torch.stack([loss.to(self.trial.dtype) for loss in losses]).sum().backward()
        for i, out in enumerate(outputs):
            values[f"output|{number}: {i}"] = out.detach().clone()
        for i, leaf in enumerate(leaves):
            values[f"input gradient|{number}: {i}"] = leaf.grad
        for optimizer in (*self.optimizers, *self.unknown):
            optimizer.step()

    def zero_grad(self, kind: str) -> None:
        """``"kept"``, ``"None"`` or ``"zeros"``."""
        if kind != "kept":
            self.model.zero_grad(set_to_none=kind == "None")

    def held(self) -> Any:
        """What the optimizers hold."""
        groups = [group for own in self.optimizers for group in own.param_groups]
        return [[(k, [id(p) for p in v] if k == "params" else v) for k, v in group.items()] for group in groups]

    def save(self, when: str, values: Values) -> None:
        """The state dict."""
        for name, value in saved(self.model).items():
            values[f"state|{when}: {name}"] = value

    def look(self, when: str, values: Values) -> None:
        """What a model in the library's own form has, by name."""
        self.save(when, values)
        names = {id(p): name for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            values[f"gradient|{when}: {name}"] = None if p.grad is None else p.grad.clone()
            values[f"trained|{when}: {name}"] = p.requires_grad
            values[f"attributes|{when}: {name}"] = str(vars(p))
        for name, module in self.model.named_modules(remove_duplicate=False):
            values[f"mode|{when}: {name}"] = module.training
            values[f"class|{when}: {name}"] = type(module).__qualname__
            values[f"norm|{when}: {name}"] = [
                getattr(module, k, None) for k in ("eps", "momentum", "track_running_stats", "p")
            ]
        for i, optimizer in enumerate((*self.optimizers, *self.unknown)):
            for j, group in enumerate(optimizer.param_groups):
                values[f"group|{when}: {i} {j}"] = [names.get(id(p), "?") for p in group["params"]]
                values[f"group names|{when}: {i} {j}"] = group.get("param_names")
            for own, state in optimizer.state.items():
                for key, value in state.items():
                    values[f"optimizer|{when}: {names.get(id(own), '?')}: {i} {key}"] = copy.deepcopy(value)


def saved(model: nn.Module) -> dict[str, Any]:
    """A state dict of its own memory."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _shake(model: nn.Module, seed: int) -> None:
    """Moves everything by a unit of rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1 + torch.randint(-2, 3, tensor.shape, generator=generator) * torch.finfo(tensor.dtype).eps)


@dataclass
class Course:
    """What one side has gone through."""

    values: Values = field(default_factory=dict)
    """By kind, time and name."""
    report: Report | None = None
    refused: str | None = None
    unread: tuple[str, ...] = ()
    """Names of what the report calls unread."""
    amplified: bool = False
    """Rounding had to be measured."""
    raised: str | None = None
    """An error of the model's own, after which there is nothing more."""


def run_course(trial: Trial, *, swap: bool, shake: int | None = None) -> Course:
    """One side from beginning to end.

    Args:
        swap: whether it is accelerated and restored on the way.
        shake: moves all weights by units of rounding.

    Raises:
        AssertionError: ``accelerate`` or ``restore`` has changed what it must not.
    """
    course = Course()
    try:
        _run(trial, course, swap, shake)
    except _OwnError as error:
        course.raised = f"{type(error.__cause__).__name__} {error}: {error.__cause__}"
    return course


class _OwnError(Exception):
    """The model fails in a step; the cause says why."""


def _run(trial: Trial, course: Course, swap: bool, shake: int | None) -> None:
    side, values, done = Side(trial, shake), course.values, 0
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in side.model.modules())

    def step(mode: str = "") -> None:
        nonlocal done
        if mode and not (drops and mode == "train"):
            side.model.train(mode == "train")
        try:
            side.step(done, values)
        except Exception as error:
            raise _OwnError(f"at step {done}") from error
        done += 1

    for module in side.model.modules():  # masks are other ones, so that nothing may be dropped
        if drops and isinstance(module, nn.Dropout):
            module.eval()
    for _ in range(trial.steps_before):
        step()
        side.zero_grad(trial.gradients)
    is_in = swap and _swap_in(side, course)
    for mode in trial.modes:
        step(mode)
        if trial.style == "original":
            side.save(f"after step {done}", values)
        side.zero_grad("None")
    _between(side, is_in, course)
    step()
    if is_in:
        _swap_out(side)
    side.look("restored", values)
    step()
    step()
    side.look("end", values)
    if trial.again:
        side.zero_grad("None")
        is_in = swap and _swap_in(side, Course())
        step()
        if is_in:
            _swap_out(side)
        side.look("again", values)
    for i, (what, value) in enumerate(side.subject.log):
        values[f"log|{i}: {what}"] = value


def _refusal(error: ValueError) -> str:
    """Of a documented kind."""
    assert any(why in str(error) for why in REFUSALS), f"an error that no page names: {error}"
    return str(error)


def _swap_in(side: Side, course: Course) -> bool:
    """Accelerates, and looks at what must not have changed. Whether it did not refuse."""
    model, style = side.model, side.trial.style
    before, random_state = saved(model), torch.get_rng_state()
    kinds, parameters, held = _kinds(model), [id(p) for p in model.parameters()], side.held()
    notes = {name: (vars(p), p.requires_grad) for name, p in side.part.named_parameters(remove_duplicate=False)}
    try:
        with AROUND[side.trial.around]():
            course.report = accelerate(side.part, optimizers=side.optimizers, state_dict=style)
    except ValueError as error:
        course.refused = _refusal(error)
        assert [id(p) for p in model.parameters()] == parameters, "refused, and other parameters"
        assert side.held() == held, "refused, and another optimizer"
    assert torch.equal(torch.get_rng_state(), random_state), "the random stream has moved"
    if course.report is None or not course.report.replaced:
        assert _kinds(model) == kinds, "nothing replaced, and other modules"
    if course.report is None or style == "original":
        after = saved(model)
        assert list(after) == list(before), f"another state dict: {set(after) ^ set(before)}"
        for name, value in before.items():
            assert torch.equal(after[name], value), f"{name} changed by the swap"
    if course.report is not None:
        for name, olds in course.report.parameters.items():
            new = side.part.get_parameter(name)
            for old in olds:
                assert notes[old] == (vars(new), new.requires_grad), f"{name} is {vars(new)}, {old} was {notes[old]}"
        where = next(path for path, module in model.named_modules() if module is side.part)
        names = [(site.path, name) for site in course.report.replaced for name in site.unread]
        course.unread = tuple(".".join(filter(None, (where, *name))) for name in names)
    return course.report is not None


def _kinds(model: nn.Module) -> list[Any]:
    return [(name, type(module), module.training) for name, module in model.named_modules()]


def _swap_out(side: Side) -> None:
    with AROUND[side.trial.around_restore]():
        restore(side.part, optimizers=side.optimizers)


def _between(side: Side, is_in: bool, course: Course) -> None:
    kind = side.trial.between
    if kind == "copy":
        own = (side.model, side.part, side.optimizers, side.unknown, side.subject.others)
        side.model, side.part, side.optimizers, side.unknown, side.subject.others = copy.deepcopy(own)
    elif kind == "load":
        # Fused names have entries of constants, which nobody may change.
        factor = 1.25 if side.trial.style == "original" else 1.0
        state = saved(side.model)
        side.model.load_state_dict({n: v * factor if v.is_floating_point() else v for n, v in state.items()})
    elif kind == "accelerate" and is_in:
        assert course.report is not None
        try:
            again = accelerate(side.part, optimizers=side.optimizers)
        except ValueError as error:
            _refusal(error)
        else:
            assert {site.path for site in course.report.replaced} <= set(again.already), "not fused any more"
