"""Experts that are classes of the user: which of their layers a level can run, and whether they run just these."""

from __future__ import annotations

import functools
from typing import NoReturn

import torch
from torch import Tensor, nn

from .plain_layers import check_bare, kind
from .trial import ROWS, quiet
from .trial_copy import calls, private


def layers_of(path: str, encoder: nn.Module) -> nn.Module:
    """The layers of an encoder: itself, if it is a Sequential or a linear layer, or the one Sequential in it.

    Raises:
        ValueError: it is made in another way, or has hooks.
    """
    if type(encoder).forward in (nn.Sequential.forward, nn.Linear.forward):
        return encoder
    check_bare(path, encoder)
    children = [child for child in encoder._modules.values() if child is not None]
    if len(children) == 1 and not encoder._parameters and not encoder._buffers:
        (child,) = children
        if type(child).forward is nn.Sequential.forward:
            return child
    _refuse(
        path, encoder, "expected an nn.Sequential, or a module whose only child is one: ple_fast runs linear layers, "
        "and cannot look into a forward",
    )  # fmt: skip


def check_encoder(path: str, encoder: nn.Module) -> None:
    """A forward of the user's is that of the Sequential in it, in eval and in train mode: both run, on copies.

    Raises:
        ValueError: it computes something else, or fails.
    """
    layers = layers_of(path, encoder)
    parameters = list(encoder.parameters())
    first = next((module for module in layers.modules() if isinstance(module, nn.Linear)), None)
    if layers is encoder or first is None or parameters[0].is_meta:
        return
    like = parameters[0]
    generator = torch.Generator(device="cpu").manual_seed(0)
    with quiet(like.device):
        rows = torch.randn(ROWS, first.in_features, generator=generator, device="cpu", dtype=torch.float64)
        x = rows.to(device=like.device, dtype=like.dtype)
        for train in (False, True):
            mode = "train" if train else "eval"
            try:
                theirs, ours = (_run(encoder, x, train, inner=inner) for inner in (False, True))
            except Exception as error:
                raise ValueError(f"{path}: {kind(encoder)}: fails on random input in {mode} mode: {error!r}") from error
            if not _alike(theirs, ours):
                _refuse(path, encoder, f"in {mode} mode its forward computes something else than its Sequential alone")


def _run(encoder: nn.Module, x: Tensor, train: bool, *, inner: bool) -> object:
    """What a copy of an encoder, or the layers in it, gives.

    What its dropouts keep is the same at every call, whatever other threads draw from the generator meanwhile.
    """
    with private(encoder, x.dtype, x.device) as copied:
        for module in copied.modules():
            module.training = train
            if train and type(module) is nn.Dropout:
                calls(module, functools.partial(_kept, module.p))
        return (layers_of("", copied) if inner else copied)(x)


def _kept(p: float, x: Tensor) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.rand(x.shape, generator=generator, device="cpu", dtype=torch.float32)
    return x * (drawn >= p).to(device=x.device, dtype=x.dtype)


def _alike(theirs: object, ours: object) -> bool:
    if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor) or theirs.shape != ours.shape:
        return False
    finite = ours[ours.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    tolerance = 200 * torch.finfo(ours.dtype).eps * scale
    return theirs.dtype == ours.dtype and torch.allclose(theirs, ours, rtol=0.0, atol=tolerance, equal_nan=True)


def _refuse(path: str, encoder: nn.Module, why: str) -> NoReturn:
    raise ValueError(f"{path}: {kind(encoder)}: {why}")
