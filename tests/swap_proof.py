"""What a swap from any library must keep: outputs, every gradient, statistics, checkpoints, and the loss curve."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from ple_fast import Report, accelerate, restore

ROWS = 23
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


class Case(NamedTuple):
    """A model of a library."""

    name: str
    make: Callable[[], nn.Module]
    arguments: Callable[[torch.dtype], tuple[Any, ...]]
    """Of its forward, for ``ROWS`` rows."""
    stale: tuple[str, ...] = ()
    """Starts of the names of running statistics that the library moves and never reads; ours stand still."""

    def __str__(self) -> str:
        return self.name


def shaken(model: nn.Module) -> nn.Module:
    """The model with weights that no initialisation gives: norms, slopes and statistics away from 1 and 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if not tensor.is_floating_point():
                    continue
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
                if isinstance(module, nn.Linear) and name == "weight":
                    tensor.copy_((noise - 0.5) * 3 * tensor.shape[1] ** -0.5)
                else:
                    tensor.copy_(noise + 0.5 if name in ("weight", "running_var") else noise - 0.5)
    return model


def flat(value: Any) -> list[Tensor]:
    """The tensors of nested lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    rows = value.values() if isinstance(value, dict) else value
    return [tensor for row in rows for tensor in flat(row)] if isinstance(rows, Sequence) or rows is not value else []


def assert_near(got: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> None:
    """Equal within ``tolerance`` of the largest of all. For no gradient there may be one of zeros: rows of a stacked
    tensor that nothing reads."""
    assert got.keys() == expected.keys()
    scale = max(float(t.abs().max()) for t in expected.values() if isinstance(t, Tensor) and t.numel())
    for name, theirs in expected.items():
        ours = got[name]
        if theirs is None:
            assert ours is None or not ours.any(), name
        else:
            assert ours.shape == theirs.shape, name
            assert not theirs.numel() or float((ours - theirs).abs().max()) <= tolerance * scale, name


def run(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, Tensor | None]:
    """Outputs of a step, and the gradients of what in the arguments has one; those of parameters stay in them."""
    given = copy.deepcopy(arguments)
    leaves = [leaf.requires_grad_() for leaf in flat(given) if leaf.is_floating_point()]
    outputs = flat(model(*given))
    generator = torch.Generator().manual_seed(2)
    loss = sum(
        (out * torch.rand(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)).sum() for out in outputs
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    return {f"output {i}": out.detach() for i, out in enumerate(outputs)} | {
        f"input {i}": leaf.grad for i, leaf in enumerate(leaves)
    }


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients by name."""
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    """State dicts with the same entries in the same order, bit for bit."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def accelerated(model: nn.Module) -> tuple[nn.Module, Report]:
    """A copy with fused levels."""
    fused = copy.deepcopy(model)
    return fused, accelerate(fused, strict=True)


def prove_results(case: Case, dtype: torch.dtype) -> None:
    """Same outputs, input and parameter gradients and statistics, in train and in eval mode."""
    torch.manual_seed(0)
    original = shaken(case.make()).to(dtype)
    fused, report = accelerated(original)
    assert report.replaced
    tolerance = TOLERANCE[dtype]
    for train in (True, False, True):
        original.train(train)
        fused.train(train)
        for model in (original, fused):
            model.zero_grad()
        arguments = case.arguments(dtype)
        assert_near(run(fused, arguments), run(original, arguments), tolerance)
        ours, theirs = fused.state_dict(), original.state_dict()
        assert list(ours) == list(theirs)
        read = [name for name in theirs if not name.startswith(case.stale or ("?",))]
        assert_near({n: ours[n].double() for n in read}, {n: theirs[n].double() for n in read}, tolerance)
        restore(fused)  # carries the gradients over, to the names that they have in the original
        assert_near(grads(fused), grads(original), tolerance)
        accelerate(fused, strict=True)


def prove_checkpoints(case: Case) -> None:
    """The checkpoint of either loads into the other bit for bit; copies, pickles and the way back keep every bit."""
    torch.manual_seed(0)
    original = shaken(case.make())
    fused, _ = accelerated(original)
    assert_same_state(fused, original)
    other, _ = accelerated(shaken(case.make()))
    other.load_state_dict(original.state_dict())
    assert_same_state(other, original)
    empty = case.make()
    empty.load_state_dict(fused.state_dict())
    assert_same_state(empty, original)
    assert_same_state(pickle.loads(pickle.dumps(fused)), original)
    saved = safetensors.torch.load(safetensors.torch.save(fused.state_dict()))
    assert all(torch.equal(saved[name], value) for name, value in original.state_dict().items())
    ours = copy.deepcopy(fused)
    restore(ours)
    assert_same_state(ours, original)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in original.named_modules()]
    assert [type(module) for module in ours.modules()] == [type(module) for module in original.modules()]
    assert [module.training for module in ours.modules()] == [module.training for module in original.modules()]
    by_our_names = copy.deepcopy(original)
    accelerate(by_our_names, state_dict="fused")
    assert any("ple_fast" in name for name in by_our_names.state_dict())
    fused.load_state_dict(by_our_names.state_dict())
    assert_same_state(fused, original)


def prove_both_ways(
    case: Case,
    from_theirs: Callable[..., nn.Module],
    to_theirs: Callable[..., nn.Module],
    roots: tuple[str, ...],
    *,
    prefix: str = "",
    unread: Collection[str] = (),
) -> None:
    """Modules and checkpoints go both ways bit for bit.

    Args:
        roots: how the names of a trunk's tensors begin; ``prefix``: what stands before them in the model.
        unread: names of those that the library never reads: a tree has zeros there, and a target keeps its own.
    """
    model = shaken(case.make())
    ours = from_theirs(model)
    theirs = {
        name.removeprefix(prefix): value
        for name, value in model.state_dict().items()
        if name.removeprefix(prefix).startswith(roots)
    }
    tree = to_theirs(ours).state_dict()
    assert list(tree) == list(theirs)
    assert all(torch.equal(tree[name], value) for name, value in theirs.items() if name not in unread)
    assert not any(tree[name].any() for name in unread)
    target = case.make()
    before = copy.deepcopy(target.state_dict())
    assert to_theirs(ours, target) is target
    for name, value in theirs.items():
        expected = before[prefix + name] if name in unread else value
        assert torch.equal(target.state_dict()[prefix + name], expected), name
    blank = from_theirs(case.make())
    prefixed = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert_same_state(from_theirs(prefixed, like=blank, prefix=f"model.{prefix}"), ours)


def rolled(value: Any, rows: int) -> Any:
    """Arguments with the rows of every tensor moved on: the same batch, added up in another order."""
    if isinstance(value, Tensor):
        return value.roll(rows, 0)
    if isinstance(value, dict):
        return {name: rolled(item, rows) for name, item in value.items()}
    return type(value)(rolled(item, rows) for item in value)


def loss_curve(model: nn.Module, case: Case, dtype: torch.dtype, *, steps: int = 200, roll: int = 0) -> Tensor:
    """Losses of Adam steps on four batches in turn, the same at every call but for the order of their rows."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.003)
    torch.manual_seed(5)
    batches = [case.arguments(dtype) for _ in range(4)]
    targets: list[list[Tensor]] = [[] for _ in batches]
    losses = []
    for step in range(steps):
        batch, wanted = batches[step % 4], targets[step % 4]
        outputs = flat(model(*rolled(batch, roll)))
        if not wanted:
            wanted += [torch.randint(0, 2, out.shape).to(dtype) for out in outputs]
        loss = torch.zeros((), dtype=dtype)
        for out, target in zip(outputs, wanted, strict=True):
            loss = loss + (out - target.roll(roll, 0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def prove_training(case: Case, dtype: torch.dtype) -> None:
    """The same loss at each of 200 Adam steps, as far as the original itself repeats it in another order of rows."""
    torch.manual_seed(0)
    original = case.make().to(dtype)
    fused, _ = accelerated(original)
    again = [copy.deepcopy(original) for _ in range(3)]
    theirs, ours = loss_curve(original, case, dtype), loss_curve(fused, case, dtype)
    rounding = max(
        float((loss_curve(model, case, dtype, roll=roll) - theirs).abs().mean())
        for model, roll in zip(again, (1, 7, 15), strict=True)
    )
    assert theirs[-1] < 0.9 * theirs[0]  # it learns something
    assert rounding < 0.05 * theirs[0]  # and the bound says something
    assert float((ours - theirs).abs().mean()) <= 3 * rounding
