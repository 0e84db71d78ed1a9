"""Synthetic tasks: the correlation that was asked for is the one measured; the same seed gives the same data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ple_fast.synthetic import synthetic_tasks


def measured(y: Tensor) -> Tensor:
    return torch.corrcoef(y.T.double())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("correlation", [1.0, 0.9, 0.5, 0.0, -0.1])
def test_labels_correlate_as_asked(correlation: float, seed: int) -> None:
    tasks = 3 if correlation >= 0 else 2  # three directions cannot all point away from each other far
    _, y = synthetic_tasks(40_000, 8, tasks, correlation=correlation, noise_std=0.0, seed=seed)
    off = measured(y)[~torch.eye(tasks, dtype=torch.bool)]
    # 5 standard errors of a correlation of 40,000 normal pairs; the labels are near enough to normal for that.
    torch.testing.assert_close(off, torch.full_like(off, correlation), rtol=0, atol=0.025 * (1 - correlation**2) + 1e-5)


@pytest.mark.parametrize("p", [1.0, 0.7, 0.0, -0.4])
def test_directions_have_the_cosine_and_the_length_asked_for(p: float) -> None:
    x, y = synthetic_tasks(200, 12, 3, cosine=p, scale=2.5, num_sinusoids=0, noise_std=0.0)  # linear: y = x (c w)ᵀ
    w = torch.linalg.lstsq(x.double(), y.double()).solution.T
    expected = 2.5**2 * torch.full((3, 3), p, dtype=torch.float64).fill_diagonal_(1.0)
    torch.testing.assert_close(w @ w.T, expected, rtol=0, atol=1e-4)


def test_every_pair_of_tasks_may_have_its_own_correlation() -> None:
    wanted = torch.tensor([[1.0, 0.8, 0.1], [0.8, 1.0, -0.1], [0.1, -0.1, 1.0]], dtype=torch.float64)
    _, y = synthetic_tasks(60_000, 8, 3, correlation=wanted, noise_std=0.0)
    torch.testing.assert_close(measured(y), wanted, rtol=0, atol=0.02)
    x, y = synthetic_tasks(100, 8, 3, cosine=wanted.tolist(), num_sinusoids=0, noise_std=0.0)
    w = torch.linalg.lstsq(x.double(), y.double()).solution.T
    torch.testing.assert_close(w @ w.T, wanted, rtol=0, atol=1e-4)


def test_labels_are_one_function_of_their_own_direction() -> None:
    """With one sinusoid, y - z is sin(alpha z + beta) = cos(beta) sin(alpha z) + sin(beta) cos(alpha z)."""
    x, y = synthetic_tasks(300, 6, 2, cosine=0.3, num_sinusoids=1, noise_std=0.0, seed=3, scale=1.2)
    same_x, z = synthetic_tasks(300, 6, 2, cosine=0.3, num_sinusoids=0, noise_std=0.0, seed=3, scale=1.2)
    assert torch.equal(x, same_x)
    wave, z = (y - z).double(), z.double()
    alphas = torch.arange(0.05, 4.0, 0.001, dtype=torch.float64)[:, None]
    parts = torch.stack((torch.sin(alphas * z[:, 0]), torch.cos(alphas * z[:, 0])), dim=2)  # (alphas, B, 2)
    factors = torch.linalg.solve(parts.mT @ parts, parts.mT @ wave[:, :1])  # least squares for every alpha at once
    errors = (parts @ factors - wave[:, :1]).abs().amax((1, 2))
    best = int(errors.argmin())
    assert errors[best] < 0.005
    assert errors.median() > 0.1, "only the right alpha fits"
    alpha, factors = alphas[best].item(), factors[best]
    assert factors.norm().item() == pytest.approx(1.0, abs=0.005)
    second = torch.stack((torch.sin(alpha * z[:, 1]), torch.cos(alpha * z[:, 1])), dim=1) @ factors
    torch.testing.assert_close(second, wave[:, 1:], rtol=0, atol=0.01)


def test_sinusoids_add_up() -> None:
    # Drawn as a block, so that only sizes are common to two numbers of sinusoids: |y - z| stays below their number.
    z = synthetic_tasks(5_000, 4, cosine=0.5, num_sinusoids=0, noise_std=0.0)[1]
    y = synthetic_tasks(5_000, 4, cosine=0.5, num_sinusoids=10, noise_std=0.0)[1]
    assert 1.0 < (y - z).abs().max().item() < 10.0


def test_noise_is_drawn_per_label() -> None:
    quiet = synthetic_tasks(20_000, 4, cosine=1.0, noise_std=0.0)[1]
    noise = synthetic_tasks(20_000, 4, cosine=1.0, noise_std=0.3)[1] - quiet
    torch.testing.assert_close(noise.std(0), torch.full((2,), 0.3), rtol=0.03, atol=0)
    torch.testing.assert_close(noise.mean(0), torch.zeros(2), rtol=0, atol=0.01)
    assert measured(noise)[0, 1].abs() < 0.03


def test_inputs_are_standard_normal() -> None:
    x, y = synthetic_tasks(20_000, 5, correlation=0.5)
    assert x.shape == (20_000, 5) and y.shape == (20_000, 2)
    assert x.dtype == y.dtype == torch.float32
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(5), rtol=0, atol=0.05)
    torch.testing.assert_close(x.mean(0), torch.zeros(5), rtol=0, atol=0.05)


def test_the_same_seed_gives_the_same_data_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first = synthetic_tasks(50, 4, 3, correlation=0.5, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    torch.randn(3)
    again = synthetic_tasks(50, 4, 3, correlation=0.5, seed=7)
    other = synthetic_tasks(50, 4, 3, correlation=0.5, seed=8)
    nearer = synthetic_tasks(50, 4, 3, correlation=0.9, seed=7)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[0], nearer[0]) and not torch.equal(first[1], nearer[1])


def test_one_task_and_no_sample() -> None:
    x, y = synthetic_tasks(0, 3, 1, correlation=0.5)
    assert x.shape == (0, 3) and y.shape == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "expected one of correlation and cosine, got correlation=None"),
        ({"correlation": 0.5, "cosine": 0.5}, "expected one of correlation and cosine"),
        ({"cosine": 1.1}, r"cosine: expected values from -1 to 1, got .*1\.1"),
        ({"correlation": float("nan")}, "correlation: expected values from -1 to 1"),
        ({"cosine": -0.6}, "no 3 vectors have the cosines .* eigenvalue -0.2000"),
        ({"cosine": [[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]]}, "no 3 vectors have"),
        ({"cosine": [[1, 0.5], [0.5, 1]]}, r"expected a number or shape \(3, 3\), got \(2, 2\)"),
        ({"cosine": [[1, 0.5, 0], [0.4, 1, 0], [0, 0, 1]]}, "symmetric matrix with ones"),
        ({"cosine": [[0.5, 0, 0], [0, 1, 0], [0, 0, 1]]}, "symmetric matrix with ones"),
        ({"correlation": -1.0}, "the labels of this seed correlate by -0.* at least, got -1.0"),
        ({"cosine": 0.5, "in_features": 2}, r"in_features: expected at least one per task \(3\), got 2"),
        ({"cosine": 0.5, "num_samples": -1}, "num_samples: expected 0 or more, got -1"),
        ({"cosine": 0.5, "num_tasks": 0}, "num_tasks: expected 1 or more, got 0"),
        ({"cosine": 0.5, "scale": 0.0}, "scale above 0"),
        ({"cosine": 0.5, "noise_std": -1.0}, "noise_std of at least 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        synthetic_tasks(**{"num_samples": 10, "in_features": 4, "num_tasks": 3, **arguments})


def test_scalar_options_of_numpy_draw_the_same() -> None:
    expected = synthetic_tasks(10, 4, 3, cosine=0.5, scale=2.0, num_sinusoids=2, noise_std=0.5, seed=3)
    sizes: list[Any] = [np.int64(10), np.uint8(4), np.int32(3)]
    options: dict[str, Any] = {
        "cosine": np.float32(0.5),
        "scale": np.float32(2.0),
        "num_sinusoids": np.int16(2),
        "noise_std": np.float16(0.5),
        "seed": np.uint64(3),
    }
    got = synthetic_tasks(*sizes, **options)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_samples", 10.0),
        ("in_features", True),
        ("num_tasks", "3"),
        ("seed", None),
        ("scale", "1"),
        ("noise_std", [1]),
    ],
)
def test_what_is_no_scalar_is_refused_by_name(name: str, value: Any) -> None:
    arguments: dict[str, Any] = {"num_samples": 10, "in_features": 4, "num_tasks": 3, "cosine": 0.5, name: value}
    with pytest.raises(TypeError, match=f"{name}: expected an? (int|number), got"):
        synthetic_tasks(**arguments)
