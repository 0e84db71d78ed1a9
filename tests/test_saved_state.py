"""Models that were changed since they were built: what ``save`` writes is what ``load`` gives back, or it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, MultiTaskModel, Numeric
from ple_fast.model.embedding import FeatureEmbedding

COLUMNS: list[Any] = [Categorical("country", values=("de", "fr"), width=3), Numeric("age")]
TASKS = [TaskLoss("click"), TaskLoss("watch", "regression")]
DATA = {"country": np.array(["de", "fr", "x"] * 4), "age": np.linspace(-2, 2, 12)}


class Bottom(nn.Module):
    """A trunk of the user's."""

    def __init__(self, in_features: int, tasks: int = 2, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(in_features, width) for _ in range(tasks))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers], dim=1)


class Other(Bottom):
    """Of the same entries, with another meaning."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Normed(Bottom):
    """Parametrised by itself."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        for layer in self.layers:
            parametrizations.weight_norm(layer)


def model(trunk: Any = "ple") -> MultiTaskModel:
    torch.manual_seed(0)
    options = {"task_experts": 2, "shared_experts": 1, "expert_units": (8, 6), "num_levels": 2}
    return MultiTaskModel(
        COLUMNS, TASKS, trunk=trunk, trunk_options=options if trunk == "ple" else None, tower_units=(5,)
    )


def layers(net: nn.Module) -> list[nn.Module]:
    """Those with a matrix."""
    weights = [(module, getattr(module, "weight", None)) for module in net.modules()]
    return [module for module, weight in weights if isinstance(weight, nn.Parameter) and weight.dim() > 1]


def tie_towers(net: MultiTaskModel) -> None:
    net.towers[1] = net.towers[0]


def tie_weights(net: MultiTaskModel) -> None:
    net.towers[1][0].weight = net.towers[0][0].weight  # type: ignore[index]


def prune_all(net: MultiTaskModel) -> None:
    for layer in layers(net):
        prune.l1_unstructured(layer, "weight", 0.4)


def prune_twice(net: MultiTaskModel) -> None:
    prune_all(net)
    for module in net.towers.modules():
        if isinstance(module, nn.Linear):
            prune.random_unstructured(module, "weight", 0.2)
            prune.ln_structured(module, "weight", 0.3, n=2, dim=0)


def norm_all(net: MultiTaskModel) -> None:
    for layer in layers(net):
        parametrizations.weight_norm(layer)


def spectral_all(net: MultiTaskModel) -> None:
    for layer in layers(net):
        parametrizations.spectral_norm(layer)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def parametrise_twice(net: MultiTaskModel) -> None:
    norm_all(net)
    for module in net.towers.modules():
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", Double())
            parametrize.register_parametrization(module, "bias", Double())


def old_norms(net: MultiTaskModel) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net.towers[0][0])  # type: ignore[index]
    nn.utils.spectral_norm(net.towers[1][0])  # type: ignore[index]


def compile_parts(net: MultiTaskModel) -> None:
    net.trunk = torch.compile(net.trunk, backend="eager")  # type: ignore[assignment]
    net.towers[0] = torch.compile(net.towers[0], backend="eager")  # type: ignore[assignment]


def missing_numbers(net: MultiTaskModel) -> None:
    net.columns = (net.columns[0], replace(net.columns[1], missing="mean"))  # type: ignore[arg-type]


KEPT = [
    tie_towers, tie_weights, prune_all, prune_twice, norm_all, spectral_all, parametrise_twice, old_norms,
    compile_parts, missing_numbers,
]  # fmt: skip


@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("trunk", ["ple", Bottom], ids=["named", "own"])
@pytest.mark.parametrize("change", KEPT, ids=lambda change: change.__name__)
def test_a_changed_model_is_given_back_with_the_values_that_it_computes_with(
    change: Callable[[MultiTaskModel], None], trunk: Any, is_training: bool, tmp_path: Path
) -> None:
    net = model(trunk)
    change(net)
    net.train(is_training)
    expected = net.predict(DATA)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.save(tmp_path)
    loaded = MultiTaskModel.load(tmp_path, trunk=None if trunk == "ple" else trunk)
    for name, value in loaded.predict(DATA).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "save changes nothing"
    assert all(module.training is is_training for module in net.modules())


def test_parts_of_several_dtypes_come_back_in_them(tmp_path: Path) -> None:
    net = model()
    net.trunk.to(torch.float64)
    net.towers[1].to(torch.float64)
    net.save(tmp_path)
    dtypes = {name: value.dtype for name, value in MultiTaskModel.load(tmp_path).state_dict().items()}
    assert dtypes == {name: value.dtype for name, value in net.state_dict().items()}
    assert len(set(dtypes.values())) == 3


def test_a_trunk_of_ones_own_that_is_parametrised_is_loaded_into_a_plain_or_a_parametrised_one(tmp_path: Path) -> None:
    net = model(Normed)
    net.save(tmp_path)
    same = MultiTaskModel.load(tmp_path, trunk=Normed)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in same.state_dict().items())

    changed = model(Bottom)
    for layer in changed.trunk.layers:  # type: ignore[union-attr]
        prune.l1_unstructured(layer, "weight", 0.5)
    changed.save(tmp_path)
    loaded = MultiTaskModel.load(tmp_path, trunk=Bottom)
    assert float((loaded.trunk.layers[0].weight == 0).float().mean()) == 0.5  # type: ignore[index, union-attr]

    def pruned(in_features: int) -> nn.Module:
        trunk = Bottom(in_features)
        for layer in trunk.layers:
            prune.identity(layer, "weight")
        return trunk

    masked = MultiTaskModel.load(tmp_path, trunk=pruned)
    assert torch.equal(masked.trunk.layers[0].weight_mask, changed.trunk.layers[0].weight_mask)  # type: ignore[index, union-attr]


def wrap_trunk(net: MultiTaskModel) -> None:
    net.trunk = nn.Sequential(net.trunk)


def add_layer(net: MultiTaskModel) -> None:
    net.towers[0].append(nn.Sigmoid())  # type: ignore[operator]


def other_activation(net: MultiTaskModel) -> None:
    net.towers[0][1] = nn.Tanh()  # type: ignore[operator]


def other_embedding(net: MultiTaskModel) -> None:
    net.embedding = FeatureEmbedding([replace(COLUMNS[0], name="state"), COLUMNS[1]])


def extra_parameter(net: MultiTaskModel) -> None:
    net.temperature = nn.Parameter(torch.ones(1))


def to_meta(net: MultiTaskModel) -> None:
    net.to("meta")


def complex_dtype(net: MultiTaskModel) -> None:
    table: Any = net.embedding.tables[0]
    table.weight = nn.Parameter(table.weight.to(torch.complex64))


def half_of_it(net: MultiTaskModel) -> None:
    net.to(torch.float8_e4m3fn)


def other_class(net: MultiTaskModel) -> None:
    trunk = Bottom(net.embedding.out_features)
    net.trunk = trunk


REFUSED: dict[Callable[[MultiTaskModel], None], str] = {
    wrap_trunk: "trunk: Sequential, expected PLE",
    add_layer: "Sigmoid, expected none",
    other_activation: "Tanh, expected ReLU",
    other_embedding: "embedding: one of other columns",
    extra_parameter: "temperature",
    to_meta: "a tensor on meta",
    complex_dtype: "got torch.complex64",
    half_of_it: "dtype: expected one of",
    other_class: "trunk: Bottom, expected PLE",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_could_not_be_loaded_is_refused_before_the_old_model_is_touched(
    change: Callable[[MultiTaskModel], None], tmp_path: Path
) -> None:
    model().save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    net = model()
    change(net)
    with pytest.raises(ValueError, match=f"^save: .*{REFUSED[change]}"):
        net.save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_trunk_of_another_class_is_refused_though_its_entries_fit(tmp_path: Path) -> None:
    model(Bottom).save(tmp_path)
    with pytest.raises(ValueError, match="trunk: expected one of class Bottom, which was saved, got Other"):
        MultiTaskModel.load(tmp_path, trunk=Other)
    compiled = MultiTaskModel.load(tmp_path, trunk=lambda width: torch.compile(Bottom(width), backend="eager"))  # type: ignore[arg-type, return-value]
    assert np.array_equal(compiled.predict(DATA)["watch"], model(Bottom).predict(DATA)["watch"])


def test_a_trunk_of_another_width_is_refused_with_the_file(tmp_path: Path) -> None:
    model(Bottom).save(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: the weights are not those of this model.*shape"):
        MultiTaskModel.load(tmp_path, trunk=lambda width: Bottom(width, width=7))


def test_a_model_of_version_1_whose_tied_weights_were_written_once_is_loaded(tmp_path: Path) -> None:
    from tests.storage_helpers import save_version_1

    net = model()
    tie_towers(net)
    save_version_1(net, tmp_path)
    loaded = MultiTaskModel.load(tmp_path)
    assert np.array_equal(loaded.predict(DATA)["watch"], net.predict(DATA)["watch"])


def test_a_save_draws_nothing_at_random_and_ignores_the_defaults_around_it(tmp_path: Path) -> None:
    net = model()
    before = torch.get_rng_state()
    net.save(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):
        net.save(tmp_path / "b")
    torch.set_default_dtype(torch.float64)
    try:
        net.save(tmp_path / "c")
        loaded = MultiTaskModel.load(tmp_path / "c")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    contents = [safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in "abc"]
    for content in contents[1:]:
        assert content.keys() == contents[0].keys()
        assert all(torch.equal(value, contents[0][name]) for name, value in content.items())
