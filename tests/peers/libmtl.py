"""Stand-ins for LibMTL (median-research-group/LibMTL, commit 4336804): its MMoE and CGC, and what weightings do.

The classes are mixed in a subclass, as its ``Trainer`` does. Its package on PyPI, 1.1.5, needs torchvision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.swap_proof import ROWS, Case

WIDTH = 7


class AbsArchitecture(nn.Module):
    """What architectures have in common; ``kwargs`` are ``img_size`` and ``num_experts``."""

    def __init__(
        self,
        task_name: Sequence[str],
        encoder_class: Callable[[], nn.Module],
        decoders: Mapping[str, nn.Module],
        rep_grad: bool,
        multi_input: bool,
        device: torch.device,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.task_name, self.task_num = task_name, len(task_name)
        self.encoder_class, self.decoders = encoder_class, decoders
        self.rep_grad, self.multi_input, self.device, self.kwargs = rep_grad, multi_input, device, kwargs
        if rep_grad:
            self.rep_tasks: dict[str, Tensor] = {}
            self.rep: dict[str, Tensor] = {}

    def _prepare_rep(self, rep: Tensor, task: str, same_rep: bool | None = None) -> Tensor:
        assert same_rep is False
        if not self.rep_grad:
            return rep
        self.rep[task] = rep
        self.rep_tasks[task] = rep.detach().clone().requires_grad_()
        return self.rep_tasks[task]


class MMoE(AbsArchitecture):
    """Shared experts, and a gate per task."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.img_size = self.kwargs["img_size"]
        self.input_size = torch.Size(self.img_size).numel()
        self.num_experts: Any = self.kwargs["num_experts"][0]
        self.experts_shared = nn.ModuleList(self.encoder_class() for _ in range(self.num_experts))
        self.gate_specific = self._gates(dict.fromkeys(self.task_name, self.num_experts))

    def _gates(self, logits: Mapping[str, int]) -> nn.ModuleDict:
        made = {t: nn.Sequential(nn.Linear(self.input_size, n), nn.Softmax(dim=-1)) for t, n in logits.items()}
        return nn.ModuleDict(made)

    def _own_experts(self, task: str) -> Sequence[nn.Module]:
        return ()

    def forward(self, inputs: Tensor, task_name: str | None = None) -> dict[str, Tensor]:
        """``(B, D)`` to what each decoder gives, or that of one task."""
        out, shared = {}, [expert(inputs) for expert in self.experts_shared]
        for task in [task for task in self.task_name if task_name in (None, task)]:
            experts = torch.stack([*shared, *(expert(inputs) for expert in self._own_experts(task))], -1)
            mixture = torch.einsum("b...e, be -> b...", experts, self.gate_specific[task](inputs.flatten(1)))
            out[task] = self.decoders[task](self._prepare_rep(mixture, task, same_rep=False))
        return out

    def get_share_params(self) -> Iterator[nn.Parameter]:
        """Those of the shared experts."""
        return self.experts_shared.parameters()

    def zero_grad_share_params(self) -> None:
        """To zero, not to None."""
        self.experts_shared.zero_grad(set_to_none=False)


class CGC(MMoE):
    """Experts of each task besides; a gate's columns begin with the shared ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shared, *own = self.kwargs["num_experts"]
        counts = dict(zip(self.task_name, own, strict=True))
        self.num_experts = counts | {"share": shared}
        made = {task: nn.ModuleList(self.encoder_class() for _ in range(n)) for task, n in counts.items()}
        self.experts_specific = nn.ModuleDict(made)
        self.gate_specific = self._gates({task: shared + n for task, n in counts.items()})

    def _own_experts(self, task: str) -> Sequence[nn.Module]:
        own: Any = self.experts_specific[task]
        return list(own)


class DSelect_k(MMoE):
    """Experts of an MMoE, weighed in another way; of its forward it is enough that it is another one."""

    def forward(self, inputs: Tensor, task_name: str | None = None) -> dict[str, Tensor]:
        """As if every expert were chosen."""
        mixture = torch.stack([expert(inputs) for expert in self.experts_shared]).mean(0)
        return {task: self.decoders[task](mixture) for task in self.task_name}


class AbsWeighting(nn.Module):
    """The vector of all shared gradients, which weightings read and write."""

    get_share_params: Any
    zero_grad_share_params: Any
    task_num: int
    task_name: Sequence[str]
    rep_grad: bool
    rep: dict[str, Tensor]
    rep_tasks: dict[str, Tensor]

    def init_param(self) -> None:
        """What a weighting keeps."""

    def _compute_grad_dim(self) -> None:
        if not hasattr(self, "grad_index"):
            self.grad_index = [p.numel() for p in self.get_share_params()]
            self.grad_dim = sum(self.grad_index)

    def _compute_grad(self, losses: Tensor, mode: str = "backward") -> Tensor:
        """``(T, grad_dim)``: per task of the shared parameters, whose gradients are zero afterwards."""
        self._compute_grad_dim()
        rows = []
        for t in range(self.task_num):
            if mode == "autograd":
                own = torch.autograd.grad(losses[t], self.get_share_params(), retain_graph=True)
            else:
                losses[t].backward(retain_graph=t + 1 < self.task_num)
                own = tuple(p.grad if p.grad is not None else torch.zeros_like(p) for p in self.get_share_params())
            rows.append(torch.cat([grad.flatten() for grad in own]).clone())
            self.zero_grad_share_params()
        return torch.stack(rows)

    def _reset_grad(self, new_grads: Tensor) -> None:
        for p, part in zip(self.get_share_params(), new_grads.split(self.grad_index), strict=True):
            if p.grad is not None:
                p.grad.data = part.view(p.shape).clone()

    def _rep_grads(self, losses: Tensor) -> list[Tensor]:
        rows = []
        for t, task in enumerate(self.task_name):
            losses[t].backward(retain_graph=t + 1 < self.task_num)
            grad = self.rep_tasks[task].grad
            assert grad is not None
            rows.append(grad.clone())
        return rows

    def _backward_new_grads(self, weights: Tensor, grads: Any) -> None:
        if not self.rep_grad:
            self._reset_grad((weights[:, None] * grads).sum(0))
            return
        for t, task in enumerate(self.task_name):
            self.rep[task].backward(weights[t] * grads[t], retain_graph=t + 1 < self.task_num)


class EW(AbsWeighting):
    """Equal weights."""

    def backward(self, losses: Tensor) -> None:
        """Of the sum."""
        losses.sum().backward()


class PCGrad(AbsWeighting):
    """Every gradient without what conflicts with another one; the order of others is fixed here."""

    def backward(self, losses: Tensor) -> None:
        """Writes the shared gradients."""
        grads = self._compute_grad(losses)
        rows = []
        for row in grads:
            for other in grads:
                row = row - torch.clamp(row @ other, max=0.0) / (other @ other + 1e-8) * other
            rows.append(row)
        self._reset_grad(torch.stack(rows).sum(0))


class MGDA(AbsWeighting):
    """The smallest convex combination of gradients, by the method of Frank and Wolfe."""

    def backward(self, losses: Tensor) -> Tensor:
        """Writes the shared gradients, and gives the weights."""
        given: Any = self._rep_grads(losses) if self.rep_grad else self._compute_grad(losses, "autograd")
        rows: Tensor = torch.stack([grad.sum(0) for grad in given]) if self.rep_grad else given
        if not self.rep_grad:
            losses.sum().backward()  # of the rest; what is shared is written anew
        products = (rows @ rows.T).double()
        weights = torch.full((len(rows),), 1.0 / len(rows), dtype=torch.float64)
        for _ in range(50):
            value = products @ weights
            step = -weights.clone()
            step[value.argmin()] += 1
            length = float(step @ products @ step)
            weights = weights + min(1.0, max(0.0, -float(step @ value) / max(length, 1e-30))) * step
        self._backward_new_grads(weights.to(losses.dtype), given)
        return weights


class MoCo(AbsWeighting):
    """A running mean of the gradients, which is kept from step to step, and begun when the model is made."""

    def init_param(self) -> None:
        """Zeros ``(T, grad_dim)``."""
        self._compute_grad_dim()
        self.y = torch.zeros(self.task_num, self.grad_dim)

    def backward(self, losses: Tensor) -> None:
        """Writes the shared gradients."""
        self.y = self.y.to(losses.dtype)
        self.y = self.y + 0.5 * (self._compute_grad(losses) - self.y)
        self._reset_grad(self.y.sum(0))


WEIGHTINGS: dict[str, type[AbsWeighting]] = {cls.__name__: cls for cls in (EW, PCGrad, MGDA, MoCo)}
ARCHITECTURES: dict[str, type[MMoE]] = {cls.__name__: cls for cls in (MMoE, CGC, DSelect_k)}


def mtl_model(architecture: type[nn.Module], weighting: type[AbsWeighting], *args: Any, **kwargs: Any) -> Any:
    """A model of a class that is made here, as the trainer makes it."""

    class MTLmodel(architecture, weighting):  # type: ignore[misc, valid-type]  # as LibMTL has it
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.init_param()

    return MTLmodel(*args, **kwargs)


class Trainer(nn.Module):
    """What it makes of its arguments; LibMTL's own also trains."""

    def __init__(
        self,
        task_dict: Mapping[str, Any],
        weighting: str,
        architecture: str,
        encoder_class: Callable[[], nn.Module],
        decoders: Mapping[str, nn.Module],
        rep_grad: bool,
        multi_input: bool,
        optim_param: Mapping[str, Any],
        scheduler_param: Mapping[str, Any] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        given = (list(task_dict), encoder_class, decoders, rep_grad, multi_input, torch.device("cpu"))
        classes = ARCHITECTURES[architecture], WEIGHTINGS[weighting]
        self.model = mtl_model(*classes, *given, **kwargs["arch_args"])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=optim_param["lr"])
        self.scheduler = scheduler_param and torch.optim.lr_scheduler.StepLR(
            self.optimizer, scheduler_param["step_size"]
        )


class EqualMMoE(MMoE, EW):
    """A model of a class that can be pickled."""


class EqualCGC(CGC, EW):
    """A model of a class that can be pickled."""


class Encoder(nn.Module):
    """A class of the user, with a Sequential in it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.hidden_layer = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, H)``."""
        y: Tensor = self.hidden_layer(inputs)
        return y


def layers(*units: int, norm: bool = False, dropout: float = 0.0, width: int = WIDTH) -> list[nn.Module]:
    """Of an encoder that reads ``width`` numbers."""
    found: list[nn.Module] = []
    for i, (before, after) in enumerate(zip([width, *units], units, strict=False)):
        norms = [nn.BatchNorm1d(after)] if norm else []
        drops = [nn.Dropout(dropout)] if dropout and i else []
        found += [nn.Linear(before, after), *norms, nn.ReLU(), *drops]
    return found


def model(
    cls: type[nn.Module],
    num_experts: Sequence[int],
    encoder_class: Callable[[], nn.Module],
    out: int,
    tasks: Sequence[str] = ("0", "1"),
    weighting: type[AbsWeighting] | None = None,
    **options: Any,
) -> Any:
    """A model on the CPU: one of ``cls``, or one that the trainer would make of it."""
    decoders = nn.ModuleDict({task: nn.Linear(out, 1 + t) for t, task in enumerate(tasks)})
    switches = {"rep_grad": False, "multi_input": False, "device": torch.device("cpu"), **options}
    sizes = {"img_size": [WIDTH], "num_experts": list(num_experts)}
    args = (list(tasks), encoder_class, decoders)
    made: Any = cls if weighting is None else lambda *a, **k: mtl_model(cls, weighting, *a, **k)
    return made(*args, **sizes | switches)


def _case(name: str, cls: type[nn.Module], experts: Sequence[int], *units: int, **options: Any) -> Case:
    own = {key: options.pop(key) for key in ("norm", "dropout") if key in options}

    def make() -> nn.Module:
        found: nn.Module = model(cls, experts, lambda: nn.Sequential(*layers(*units, **own)), units[-1], **options)
        vars(found)["encoder_class"] = nn.Sequential  # a class, as users have it: a function cannot be pickled
        return found

    return Case(f"LibMTL, {name}", make, lambda dtype: (torch.randn(ROWS, WIDTH, dtype=dtype),))


CASES = [
    _case("CGC", EqualCGC, [2, 1, 2], 6, 5),
    _case("CGC, batch norm", EqualCGC, [1, 2, 2, 1], 4, tasks=("0", "1", "2"), norm=True),
    _case("CGC, one expert of each", EqualCGC, [1, 1], 5, tasks=("0",)),
]
MMOES = [
    _case("MMoE", EqualMMoE, [3], 6, 5),
    _case("MMoE, batch norm", EqualMMoE, [2], 4, tasks=("0", "1", "2"), norm=True),
    _case("MMoE, the class itself", MMoE, [1], 5, 4, 3),
]
