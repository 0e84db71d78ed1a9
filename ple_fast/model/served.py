"""A whole model for deployment: codes and numbers to predictions, in one module that compilers and exporters take."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..losses import entire_space
from ..modules import ExtractionNetwork
from .columns import Encoded
from .evaluation import prediction_of
from .network import TaskNetwork
from .saved_state import uncompiled
from .served_towers import served_towers

M = TypeVar("M", bound=nn.Module)


class ServedModel(nn.Module):
    """What ``MultiTaskModel.predict`` computes, on tensors: a copy in eval mode, without what only training needs.

    Made by ``MultiTaskModel.for_inference``; ``model.encoder()`` makes its inputs, in a process without torch too.
    """

    task_names: tuple[str, ...]
    """The keys of the predictions, in order: names for the outputs of an exported program."""

    def __init__(self, model: TaskNetwork, *, plain: bool) -> None:
        super().__init__()
        for task in model.tasks:
            task.check_measured()
        self.task_names = tuple(model.task_names)
        self._tasks, self._given = model.tasks, dict(model.given)
        with torch.no_grad():
            self.embedding = inference_copy(model.embedding, plain=plain)
            self.slot_inputs = None if model.slot_inputs is None else inference_copy(model.slot_inputs, plain=plain)
            self.priors = None if model.priors is None else inference_copy(model.priors, plain=plain)
            self.trunk = inference_copy(model.trunk, plain=plain)
            towers = inference_copy(model.towers, plain=plain)
            self.towers = served_towers(towers, 2.0 if model.priors is None else model.priors.factor)
        self._dtype = next(model.towers.parameters()).dtype
        self.eval()

    def forward(self, codes: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Predictions by task, float32: probabilities ``(B,)``, values ``(B,)``, or class probabilities ``(B, C)``.

        Args:
            codes: ``(B, C)``, int32 or int64, and
            numbers: ``(B, N)``, float32: the two fields of :class:`Encoded`, on the device of the model.

        Raises:
            TypeError: codes that are no integers, numbers that are not floating.
            ValueError: another width, or two different numbers of rows.
        """
        if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None:  # torch.jit.trace
            self._check(codes, numbers)
        features: Any = self.embedding(Encoded(codes, numbers)).to(self._dtype)
        scales: list[Tensor] = []
        if self.priors is not None:
            features, scales = self.priors(features)
        if self.slot_inputs is not None:
            features = self.slot_inputs(features)
        outputs: dict[str, Tensor] = {}
        predictions: dict[str, Tensor] = {}
        for task, output in zip(self._tasks, self.towers(self.trunk(features), scales), strict=True):
            if task.kind != "multiclass":
                output = output.squeeze(1)
            if task.name in self._given:
                output = entire_space(outputs[self._given[task.name]], output)
            outputs[task.name] = output
            predictions[task.name] = prediction_of(task, output)
        return predictions

    def _check(self, codes: Any, numbers: Any) -> None:
        for name, given in (("codes", codes), ("numbers", numbers)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}; torch.from_numpy makes one")
        if codes.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"codes: expected int32 or int64, got {codes.dtype}; model.encode gives them")
        if not numbers.is_floating_point():
            raise TypeError(f"numbers: expected float32, got {numbers.dtype}; model.encode gives them")
        if codes.shape[:1] != numbers.shape[:1]:
            raise ValueError(
                f"numbers: expected as many rows as codes, got {tuple(numbers.shape)} beside {tuple(codes.shape)}"
            )


def inference_copy(module: M, *, plain: bool) -> M:
    """A copy in eval mode that shares no tensor, nothing in it compiled, levels as ``for_inference`` makes them."""
    module = uncompiled(module)  # type: ignore[assignment]  # what is compiled has the type of what it wraps
    memo: dict[int, Any] = {}
    for part in module.modules():
        if isinstance(part, ExtractionNetwork):
            memo[id(part)] = part.for_inference(plain=plain)
        elif uncompiled(part) is not part:
            memo[id(part)] = inference_copy(part, plain=plain)
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a pruned weight, which deepcopy refuses
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo).requires_grad_(False).eval()
