"""Compile ahead of the first step what it will need."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .backend import resolve
from .modules import ExtractionNetwork
from .modules.stack import Stack
from .scalars import check_count, check_counts, check_flag, is_sequence, shown

Part = Stack | ExtractionNetwork
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_always_called")))
"""Attributes of every module that hold hooks, or what PyTorch notes of them."""


def warm_up(
    module: nn.Module,
    batches: int | Sequence[int],
    *,
    training: bool = True,
    inference: bool = True,
    autocast: torch.dtype | None = None,
) -> None:
    """Compile the kernels that calls of ``module`` at these batch sizes need, so that the first step does not wait.

    Every trunk and every level in ``module`` is run at each size, on a copy without the user's weights and hooks:
    parameters, gradients, running statistics, modes and the states of PyTorch's random generators stay as they are,
    other threads may use the module meanwhile, and DistributedDataParallel sees nothing. What is compiled is kept for
    this process, and on disk by Triton. Where no kernels run (CPU tensors, ``use_backend("torch")``) nothing is run.

    Kernels differ by the parameters' dtypes and by which of them are frozen, by the precision of float32 products, and
    by the tile tables: call this after all of these are set.

    Args:
        module: a trunk, a level, or a model that holds some, also inside ``DistributedDataParallel``, ``torch.compile``
            or after ``accelerate``.
        batches: numbers of rows.
        training: run forward and backward, in the modes that the trunk has; all of it in train mode where it is in eval
            mode now. A trunk in eval mode that learns nothing, as ``for_inference`` makes it, is not trained.
        inference: run in eval mode without gradients.
        autocast: also under ``torch.autocast`` of this dtype. None: under what is in force at the call.

    Raises:
        TypeError: an argument of another type.
        ValueError: no trunk and no level in ``module``, or ``batches`` holds 1 (or nothing) for batch norm in training.
        RuntimeError: in the capture of a CUDA graph, or the trunk cannot be copied (FSDP: call this before it wraps).
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a trunk or a model, got {shown(module)} ({type(module).__name__})")
    sizes = check_counts("batches", batches) if is_sequence(batches) else (check_count("batches", batches),)
    if not sizes:
        raise ValueError("batches: expected one number of rows or more, got none")
    learns, serves = check_flag("training", training), check_flag("inference", inference)
    asked: Any = autocast
    if asked is not None and not (isinstance(asked, torch.dtype) and asked.is_floating_point):
        raise TypeError(f"autocast: expected a dtype such as torch.bfloat16, or None, got {shown(autocast)}")
    parts = list(_parts(module))
    if not parts:
        raise ValueError(f"module: expected a trunk of ple_fast, or a model with one, got {type(module).__name__}")
    for name, part in parts:
        device = next(part.parameters()).device
        if resolve(device, _levels(part)[0]._backend).name != "triton":
            continue
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("warm_up: expected to be called before a CUDA graph is captured, not within the capture")
        region: AbstractContextManager[Any] = nullcontext()
        if autocast is not None:
            region = torch.autocast(device.type, dtype=autocast)
        # Within inference mode no gradient could be recorded.
        with torch.inference_mode(False), region:
            twin = _twin(name, part)
            if learns and (part.training or any(p.requires_grad for p in part.parameters())):
                _train(twin if _any_trains(part) else twin.train(), sizes)
            if serves:
                _serve(twin.eval(), sizes)


def _parts(module: nn.Module) -> Iterator[tuple[str, Part]]:
    """Trunks, and levels that stand alone, with their names."""
    inside: set[int] = set()
    for name, child in module.named_modules():
        if isinstance(child, Part) and id(child) not in inside:
            inside.update(map(id, child.modules()))
            yield name, child


def _levels(part: Part) -> list[ExtractionNetwork]:
    return [level for level in part.modules() if isinstance(level, ExtractionNetwork)]


def _any_trains(part: Part) -> bool:
    return any(module.training for module in part.modules())


def _no_seed(device: torch.device) -> Tensor:
    """In place of what draws a seed of dropout from the user's generators."""
    return torch.zeros((), dtype=torch.int64, device=device)


def _twin(name: str, part: Part) -> Part:
    """A copy with parameters of its own, all 0, and without hooks."""
    memo: dict[int, Any] = {}
    for parameter in part.parameters():
        fresh = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        memo[id(parameter)] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
    for child in part.modules():
        memo.update((id(hooks), OrderedDict()) for hooks in (vars(child).get(hook) for hook in _HOOKS) if hooks)
    try:
        twin = copy.deepcopy(part, memo)
    except Exception as error:
        where = f"{name!r} ({type(part).__name__})" if name else type(part).__name__
        raise RuntimeError(
            f"warm_up: {where} cannot be copied ({error}); call warm_up before the module is wrapped or changed"
        ) from error
    for child in twin.modules():
        vars(child).pop("forward", None)  # one that stands on the instance is bound to the original
    for level in _levels(twin):
        vars(level)["_seed"] = _no_seed
    return twin


def _inputs(part: Part, batch: int, **options: Any) -> Iterator[tuple[Tensor, ...]]:
    """What a part is called with: a trunk reads ``(B, D)``; a level, of a trunk that is not ours, that or one row of
    each slot, and what its gates read where that is something else."""
    like = next(part.parameters())

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch, *shape, dtype=like.dtype, device=like.device, **options)

    if isinstance(part, Stack):
        yield (zeros(part.in_features),)
        return
    slots = part.topology.num_slots
    assert slots is not None
    of_gates = () if part.gate_features == part.in_features and part.gate_spec.input != "raw" else (part.gate_features,)
    for shape in ((), (slots,))[: 1 + (slots > 1)]:
        yield (zeros(*shape, part.in_features), *(zeros(width) for width in of_gates))


def _train(part: Part, sizes: Sequence[int]) -> None:
    with torch.enable_grad():
        for batch in sizes:
            for tensors in _inputs(part, batch, requires_grad=True):
                y = part(*tensors)
                y.backward(torch.zeros_like(y))


def _serve(part: Part, sizes: Sequence[int]) -> None:
    with torch.no_grad():
        for batch in sizes:
            for tensors in _inputs(part, batch):
                part(*tensors)
