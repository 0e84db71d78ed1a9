"""Classes that are called PLE and compute something else, so that ``accelerate`` leaves them and says why."""

from __future__ import annotations

from torch import nn

from .converter import refuse_class


def _is_merlins(module: nn.Module) -> bool:
    """A block whose children, in ``values``, are CGC blocks."""
    values = getattr(module, "values", None)
    return isinstance(values, nn.ModuleList) and any(type(child).__name__ == "CGCBlock" for child in values)


def _is_libmtls(module: nn.Module) -> bool:
    """An architecture whose encoder is made of the stages of a ResNet."""
    encoder = getattr(module, "encoder", None)
    return all(hasattr(encoder, name) for name in ("specific_layer", "shared_layer", "gate_specific"))


refuse_class(
    "PLEBlock",
    _is_merlins,
    "Merlin's PLEBlock (PyTorch) is no PLE from depth 2 on: what the tasks' experts and gates of a lower level compute "
    "is thrown away, and those of the last level read the raw input; build the trunk with ple_fast.PLE and train it",
)
refuse_class(
    "PLE",
    _is_libmtls,
    "LibMTL's PLE has the convolutional stages of a ResNet as experts and no shared gate, and ple_fast runs experts of "
    "linear layers only",
)
