"""What a forward keeps for backward, and how many operators a step calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.configs import TrunkConfig
from benchmarks.steps import inputs


def saved_bytes(forward: Callable[[], Iterable[Tensor]], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that ``forward()`` keeps alive for backward: each storage once and whole, without those of ``exclude``.

    Counted with ``torch.autograd.graph.saved_tensors_hooks``. Tensors that a custom ``autograd.Function`` hangs on its
    context, past the hooks, count as well.
    """
    saved: list[Tensor] = []  # holds them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = list(forward())
    saved += _on_contexts(outputs)
    skip = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    return sum(size for address, size in storages.items() if address not in skip)


def _on_contexts(outputs: Iterable[Tensor]) -> list[Tensor]:
    """Tensors in the attributes of the graph's Python nodes."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    todo = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        found += _tensors(getattr(node, "__dict__", {}))
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _tensors(item)


class _Counter(TorchDispatchMode):
    """Counts operators that reach the dispatcher; views move no data and are left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Cost:
    """Of one training step: bytes saved for backward, and operators of forward and of backward (views left out)."""

    saved_bytes: int
    forward_operators: int
    backward_operators: int


def cost(trunk: nn.Module, config: TrunkConfig, *, input_grad: bool = True, device: torch.device | str = "cpu") -> Cost:
    """Measure an eager trunk at its size; its gradients are reset and its buffers are left as one step leaves them."""
    trunk.train()
    x, grads = inputs(config, input_grad=input_grad, device=device)
    saved = saved_bytes(lambda: trunk(x), [*trunk.parameters(), x])
    with _Counter() as forward:
        outputs = list(trunk(x))
    with _Counter() as backward:
        torch.autograd.backward(outputs, grads)
    trunk.zero_grad(set_to_none=True)
    return Cost(saved, forward.count, backward.count)
