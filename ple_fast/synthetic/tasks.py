"""Regression tasks of controlled correlation: the MMoE paper's synthetic data (Ma et al., KDD 2018, section 3.2).

Every task is the same non-linear function of its own direction in the space of the inputs; the angle between the
directions makes the tasks related. The PLE paper's figure 7 compares models on such data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..scalars import check_count, check_number, check_seed

__all__ = ["synthetic_tasks"]

Correlation = float | Sequence[Sequence[float]] | Tensor


@torch.inference_mode(False)  # or nothing could be trained on them
def synthetic_tasks(
    num_samples: int,
    in_features: int,
    num_tasks: int = 2,
    *,
    correlation: Correlation | None = None,
    cosine: Correlation | None = None,
    scale: float = 1.0,
    num_sinusoids: int = 10,
    noise_std: float = 0.1,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draws inputs and one continuous label per task.

    ``y_k = z_k + sum_i sin(alpha_i z_k + beta_i) + noise`` with ``z_k = scale * (w_k . x)``, unit vectors ``w_k`` of
    which two have the cosine p, ``x ~ N(0, 1)`` and normal noise. As in the PLE paper, ``alpha_i, beta_i ~ N(0, 1)``
    are shared by the tasks, and its sizes are the defaults (it has 512 features and 1.4 million samples).

    The labels' Pearson correlation is a non-linear function of p. Give one of ``correlation`` and ``cosine``: one
    number for all pairs of tasks, or a symmetric matrix ``(T, T)`` with ones on the diagonal.

    Args:
        correlation: of the labels before noise; p is found from the closed form of the correlation under normal inputs.
        cosine: p itself, what the MMoE paper sets.
        scale: c of the papers, above 0.
        num_sinusoids: m of the papers; 0 makes the labels linear.
        noise_std: standard deviation of the noise, drawn per label (MMoE paper: variance 0.01).
        seed: of generators of its own: PyTorch's global one is not touched. One seed gives the same inputs, noise,
            alpha and beta at every correlation. For training and test data of the same tasks split the rows of a call.

    Returns:
        ``x (num_samples, in_features)`` and ``y (num_samples, num_tasks)``, float32 on the CPU.

    Raises:
        TypeError: a size or seed that is no int, a ``scale`` or ``noise_std`` that is no number (NumPy's are).
        ValueError: both or none of ``correlation`` and ``cosine``; a value outside [-1, 1]; a correlation that these
            labels cannot have; cosines that no vectors have (T tasks of one cosine: below ``-1 / (T - 1)``); a size
            that is negative or too small.
    """
    num_samples, num_tasks = check_count("num_samples", num_samples, least=0), check_count("num_tasks", num_tasks)
    in_features, num_sinusoids = (
        check_count("in_features", in_features),
        check_count("num_sinusoids", num_sinusoids, least=0),
    )
    seed = check_seed(seed)
    scale, noise_std = check_number("scale", scale), check_number("noise_std", noise_std)
    if in_features < num_tasks:
        raise ValueError(f"in_features: expected at least one per task ({num_tasks}), got {in_features}")
    if not (0 < scale < float("inf") and 0 <= noise_std < float("inf")):
        raise ValueError(f"expected a finite scale above 0 and noise_std of at least 0, got {scale} and {noise_std}")
    # The device and both dtypes are named: what the user has set as default is for the user's own tensors.
    wide: dict[str, Any] = {"device": "cpu", "dtype": torch.float64}
    generator = torch.Generator(device="cpu").manual_seed(seed)
    basis = torch.randn(in_features, num_tasks, generator=generator, **wide)
    basis = torch.linalg.qr(basis).Q.T  # (T, D), orthonormal rows
    samples = torch.Generator(device="cpu").manual_seed(
        int(torch.randint(2**62, (), generator=generator, device="cpu"))
    )
    alpha, beta = torch.randn(2, num_sinusoids, generator=generator, **wide)

    if (correlation is None) == (cosine is None):
        raise ValueError(f"expected one of correlation and cosine, got correlation={correlation}, cosine={cosine}")
    if cosine is None:
        assert correlation is not None
        wanted = _pairs("correlation", correlation, num_tasks)
        cosines, found = torch.eye(num_tasks, **wide), dict[float, float]()
        for i, j in torch.combinations(torch.arange(num_tasks, device="cpu")).tolist():
            value = wanted[i, j].item()
            if value not in found:
                found[value] = _cosine_for(value, scale * alpha, beta, scale)
            cosines[i, j] = cosines[j, i] = found[value]
    else:
        cosines = _pairs("cosine", cosine, num_tasks)
    values, vectors = torch.linalg.eigh(cosines)
    if values[0] < -1e-9:
        raise ValueError(
            f"no {num_tasks} vectors have the cosines {[[round(p, 4) for p in row] for row in cosines.tolist()]}: the "
            f"matrix has the eigenvalue {values[0].item():.4f}, below 0; choose values nearer to 0 or to each other"
        )
    directions = (vectors * values.clamp(min=0).sqrt()) @ basis  # rows w_k: their products are the cosines

    narrow: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    x = torch.randn(num_samples, in_features, generator=samples, **narrow)
    z = scale * (x.double() @ directions.T).float()  # no setting makes products of float64 less exact
    y = z + noise_std * torch.randn(z.shape, generator=samples, **narrow)
    for a, b in zip(alpha.tolist(), beta.tolist(), strict=True):
        y += torch.sin(a * z + b)
    return x, y


def _pairs(name: str, value: Correlation, num_tasks: int) -> Tensor:
    """The matrix ``(T, T)``, float64, from one number for all pairs or from itself."""
    matrix = torch.as_tensor(value, device="cpu", dtype=torch.float64)
    if matrix.ndim == 0:
        matrix = torch.full_like(matrix, matrix.item()).expand(num_tasks, num_tasks).clone().fill_diagonal_(1.0)
    if matrix.shape != (num_tasks, num_tasks):
        raise ValueError(f"{name}: expected a number or shape ({num_tasks}, {num_tasks}), got {tuple(matrix.shape)}")
    if not (matrix.abs() <= 1).all():
        raise ValueError(f"{name}: expected values from -1 to 1, got {matrix.tolist()}")
    if not torch.equal(matrix, matrix.T) or not (matrix.diagonal() == 1).all():
        raise ValueError(f"{name}: expected a symmetric matrix with ones on the diagonal, got {matrix.tolist()}")
    return matrix


def _label_correlation(p: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Pearson correlation of ``f(U)`` and ``f(V)`` for standard normal U, V of correlation p, elementwise over p.

    ``f(u) = scale u + sum_i sin(a_i u + b_i)``; ``E sin(sU + tV + r) = exp(-(s² + t² + 2pst) / 2) sin r`` and Stein's
    lemma, ``E U sin(sV + r) = p s exp(-s² / 2) cos r``, give the covariance.
    """
    mean = torch.exp(-(a**2) / 2)
    product = a.outer(a)
    difference, total = torch.cos(b[:, None] - b), torch.cos(b[:, None] + b)

    def covariance(p: Tensor) -> Tensor:
        q = p[..., None, None]
        # exp(±q aa') exp(-(a² + a'²) / 2), each exponent summed first: neither factor alone need be representable.
        square = (a[:, None] ** 2 + a**2) / 2
        waves = (torch.exp(q * product - square) * difference - torch.exp(-q * product - square) * total) / 2
        mixed = 2 * scale * p * (a * mean * torch.cos(b)).sum()
        return scale**2 * p + mixed + waves.sum((-2, -1)) - (mean * torch.sin(b)).sum() ** 2

    return covariance(p) / covariance(torch.ones_like(p))


def _cosine_for(correlation: float, a: Tensor, b: Tensor, scale: float) -> float:
    """The p nearest to 0 at which the labels have this correlation."""
    # With f's Hermite coefficients h_n the correlation is sum_n h_n² pⁿ / sum_n h_n²: it rises from 0 to 1 on [0, 1],
    # but on [-1, 0] it may have a minimum. So: the first crossing on a grid that starts at 0, then bisection.
    grid = torch.linspace(0, 1 if correlation > 0 else -1, 201, device="cpu", dtype=torch.float64)
    found = _label_correlation(grid, a, b, scale)
    reached = found >= correlation - 1e-12 if correlation > 0 else found <= correlation + 1e-12
    if not reached.any():
        raise ValueError(
            f"correlation: the labels of this seed correlate by {found.min().item():.4f} at least, got {correlation}; "
            "ask for more, or take another seed"
        )
    outer = int(reached.int().argmax())
    low, high = grid[max(outer - 1, 0)], grid[outer]
    for _ in range(60):
        middle = (low + high) / 2
        beyond = _label_correlation(middle, a, b, scale).item() - correlation
        low, high = (low, middle) if beyond * (1 if correlation > 0 else -1) >= 0 else (middle, high)
    return float(high)
