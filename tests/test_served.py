"""A whole model for deployment: what ``predict`` gives, eager, traced, compiled, exported, in ONNX and AOTInductor."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, Encoded, Hashed, MultiTaskModel, Numeric, ServedModel
from ple_fast.model.served_towers import FusedTowers, SingleTowers
from ple_fast.model.towers import TOWER_ACTIVATIONS
from tests.helpers import randomise
from tests.model_helpers import COLUMNS, SMALL, TASKS, Bottom, model, table

POOLED = (
    *COLUMNS,
    Hashed("user", 50, width=3),
    Categorical("tags", values=("a", "b"), pooling="mean", max_length=2),
    Categorical("seen", share="hour", pooling="sum", max_length=3),
    Hashed("ids", 9, width=5, pooling="max", max_length=2),
    Numeric("score", width=4),
)
SCALED = (TaskLoss("click"), TaskLoss("watch", "regression", mean=1e4, std=300.0), TASKS[2])
CHAIN = (TaskLoss("click"), TaskLoss("cart"), TaskLoss("buy"))
NORMED = SMALL["ple"] | {"norm": "batch", "dropout": 0.5, "activation": "dice"}
CASES: dict[str, Callable[[], MultiTaskModel]] = {
    **{name: lambda name=name: model(name) for name in SMALL},  # type: ignore[misc]  # a lambda with a default
    "norms": lambda: model(
        "ple", trunk_options=NORMED, tower_dropout=0.5, tower_units=(6, 5), tower_activation="prelu"
    ),
    "layer norm": lambda: model("cgc", trunk_options=SMALL["cgc"] | {"norm": "layer", "gate_units": (4,)}),
    "pooled": lambda: model(columns=POOLED),
    "numbers alone": lambda: model(columns=(COLUMNS[1], COLUMNS[3])),
    "codes alone": lambda: model(columns=(COLUMNS[0], COLUMNS[2])),
    "standardised": lambda: model(tasks=SCALED),
    "chain": lambda: model(tasks=CHAIN, given={"cart": "click", "buy": "cart"}),
    "columns by task": lambda: model("cgc", task_columns={"click": ["age", "hour"]}),
    "task embeddings": lambda: model("stem", task_embeddings=True, columns=POOLED),
    "task embeddings of task columns": lambda: model(
        "cgc", task_embeddings=True, sparse_embeddings=True, task_columns={"click": ["age", "hour"]}
    ),
    "custom trunk": lambda: model(Bottom),
    "no tower layers": lambda: model(tower_units=()),
}


def built(name: str) -> tuple[MultiTaskModel, Encoded]:
    """A model in train mode with statistics that say something, and rows."""
    made = CASES[name]()
    randomise(made)
    rng = np.random.default_rng(0)
    data, _ = table(40)
    data |= {
        "user": rng.integers(0, 10**9, 40),
        "tags": [list(rng.choice(["a", "b", "c"], rng.integers(0, 4))) for _ in range(40)],
        "seen": [rng.integers(0, 30, rng.integers(0, 5)) for _ in range(40)],
        "ids": [list(map(int, rng.integers(0, 99, rng.integers(0, 3)))) for _ in range(40)],
        "score": rng.normal(size=40),
    }
    return made, made.encode(data)


def assert_predictions(found: Any, model: MultiTaskModel, rows: Encoded, tolerance: float = 2e-5) -> None:
    expected = model.predict(rows)
    assert list(found) == model.task_names
    for name, value in expected.items():
        got = torch.as_tensor(np.asarray(found[name]))
        assert got.dtype is torch.float32 and got.shape == value.shape, name
        torch.testing.assert_close(got, torch.from_numpy(value), rtol=tolerance, atol=tolerance)


def parts(rows: Encoded) -> Iterable[Encoded]:
    """Of one row, of some, of all."""
    return (rows.rows(slice(3, 4)), rows.rows(slice(7)), rows)


def assert_serves(run: Callable[[Tensor, Tensor], Any], model: MultiTaskModel, rows: Encoded) -> None:
    for part in parts(rows):
        assert_predictions(run(*part), model, part)


def some(quick: Collection[Any], *axes: Iterable[Any]) -> list[Any]:
    """Every combination; those that are not in ``quick`` are slow."""
    return [
        pytest.param(*row, marks=() if row in quick else pytest.mark.slow, id="-".join(map(str, row)))
        for row in itertools.product(*axes)
    ]


@pytest.mark.parametrize("name", CASES)
def test_it_predicts_what_the_model_predicts(name: str) -> None:
    model, rows = built(name)
    served = model.for_inference()
    assert_serves(served, model, rows)
    assert_serves(lambda codes, numbers: served(codes.long(), numbers), model, rows)
    with torch.inference_mode():
        assert_serves(served, model, rows)
    assert all(module.training is False for module in served.modules())
    assert not any(isinstance(module, nn.Dropout) for module in served.modules())
    assert not any(parameter.requires_grad for parameter in served.parameters())
    assert model.training and any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("activation", TOWER_ACTIVATIONS)
@pytest.mark.parametrize("units", [(), (5,), (6, 5)], ids=str)
@pytest.mark.parametrize("tasks", [TASKS, TASKS[:1], CHAIN], ids=["mixed", "one", "alike"])
def test_towers_of_every_make_up_are_served(activation: str, units: tuple[int, ...], tasks: Any) -> None:
    made = model(Bottom if len(tasks) == 3 else lambda width: Bottom(width, 1), tasks=tasks, tower_units=units,
                 tower_activation=activation, tower_dropout=0.5)  # fmt: skip
    randomise(made)
    rows, served = made.encode(table(40)[0]), made.for_inference()
    is_fused = len(tasks) > 1 and not (activation == "prelu" and units)
    assert isinstance(served.towers, FusedTowers if is_fused else SingleTowers)
    assert_serves(served, made, rows)


def test_towers_that_somebody_changed_are_served_as_they_are() -> None:
    made, rows = built("chain")
    towers: Any = made.towers
    towers[1] = nn.Sequential(nn.ReLU(), nn.Linear(6, 1))
    assert_serves(made.for_inference(), made, rows)
    made, rows = built("chain")
    towers = made.towers
    towers[0][1].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert_serves(made.for_inference(), made, rows)
    made, rows = built("chain")
    made.towers[2] = nn.Linear(6, 1, bias=False)
    assert_serves(made.for_inference(), made, rows)


def test_it_is_a_copy_that_the_training_of_the_model_leaves_alone() -> None:
    model, rows = built("norms")
    served, before = model.for_inference(), model.predict(rows)
    own = {id(tensor) for tensor in (*served.parameters(), *served.buffers())}
    assert own.isdisjoint(map(id, (*model.parameters(), *model.buffers())))
    places = {tensor.untyped_storage().data_ptr() for tensor in served.state_dict().values() if tensor.numel()}
    assert places.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values())
    _, labels = table(40)
    model.fit(rows, labels, epochs=1, progress=False)
    after = served(*rows)
    assert all(np.allclose(after[name], before[name], atol=2e-5) for name in before)
    assert not np.allclose(model.predict(rows)["click"], before["click"], atol=1e-4)


def test_it_serves_from_threads_while_the_model_trains() -> None:
    model, rows = built("ple")
    served = model.for_inference()
    expected = served(*rows)
    wrong: list[str] = []

    def serve() -> None:
        for _ in range(20):
            with torch.inference_mode():
                found = served(*rows)
            wrong.extend(name for name in found if not torch.equal(found[name], expected[name]))

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    model.fit(rows, table(40)[1], epochs=2, batch_size=8, progress=False)
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_are_served_in_theirs(dtype: torch.dtype) -> None:
    model, rows = built("ple")
    model.to(dtype)
    assert_predictions(model.for_inference()(*rows), model, rows, 2e-2 if dtype is torch.bfloat16 else 2e-5)


def test_pruned_parametrised_and_compiled_parts_are_served_as_values() -> None:
    model, rows = built("custom trunk")
    trunk: Any = model.trunk
    prune.l1_unstructured(trunk.layers[0], "weight", 0.5)
    parametrizations.weight_norm(trunk.layers[1])
    model.eval()
    model(rows)  # the pruned weight is now what a forward computed
    towers: Any = model.towers
    towers[0] = torch.compile(towers[0], backend="eager")
    served = model.for_inference()
    assert_serves(served, model, rows)
    compiled: Any = torch.compile(trunk, backend="eager")
    model.trunk = compiled
    assert_serves(model.for_inference(), model, rows)


def test_no_gradient_mode_or_inference_mode_at_the_time_changes_what_is_made() -> None:
    model, rows = built("ple")
    with torch.inference_mode():
        served = model.for_inference()
    assert not any(tensor.is_inference() for tensor in (*served.parameters(), *served.buffers()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = model.for_inference()
    assert_serves(served, model, rows)
    assert_serves(again, model, rows)


def test_copies_and_pickles_serve() -> None:
    model, rows = built("pooled")
    served = model.for_inference()
    for twin in (copy.deepcopy(served), pickle.loads(pickle.dumps(served))):
        assert isinstance(twin, ServedModel)
        assert_serves(twin, model, rows)


def test_a_state_dict_goes_into_one_that_was_made_alike() -> None:
    model, rows = built("norms")
    served = CASES["norms"]().for_inference()
    served.load_state_dict(model.for_inference().state_dict())
    assert_serves(served, model, rows)


def test_what_does_not_fit_is_refused() -> None:
    model, rows = built("ple")
    served = model.for_inference()
    codes, numbers = rows
    with pytest.raises(TypeError, match=r"^codes: expected a tensor, got ndarray; torch.from_numpy"):
        served(codes.numpy(), numbers)
    with pytest.raises(TypeError, match=r"^codes: expected int32 or int64, got torch.float32"):
        served(numbers, numbers)
    with pytest.raises(TypeError, match=r"^numbers: expected float32, got torch.int32"):
        served(codes, codes)
    with pytest.raises(ValueError, match=r"^numbers: expected as many rows as codes, got \(3, 3\) beside \(40, 2\)"):
        served(codes, numbers[:3])
    with pytest.raises(ValueError, match=r"codes: expected shape \(B, 2\), got \(40, 1\)"):
        served(codes[:, :1], numbers)
    unmeasured = MultiTaskModel(COLUMNS, [TaskLoss("watch", "regression", standardise=True)])
    with pytest.raises(ValueError, match="'watch': standardise=True"):
        unmeasured.for_inference()


def exported(served: nn.Module, rows: Encoded, *, strict: bool = False) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(served, tuple(rows), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)


QUICK = {("ple", False), ("pooled", True), ("norms", False), ("chain", True), ("columns by task", False)}


@pytest.mark.parametrize(("name", "strict"), some(QUICK, CASES, (False, True)))
def test_export_save_and_load(name: str, strict: bool, tmp_path: Path) -> None:
    model, rows = built(name)
    program = exported(model.for_inference(), rows, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if target.startswith("ple_fast")]
    torch.export.save(program, tmp_path / "model.pt2")
    assert_serves(torch.export.load(tmp_path / "model.pt2").module(), model, rows)


@pytest.mark.parametrize("name", some({("pooled",), ("norms",)}, CASES))
def test_onnx(name: str, tmp_path: Path) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, rows = built(name)
    served, file = model.for_inference(), tmp_path / "model.onnx"
    torch.onnx.export(
        served, tuple(rows), file, dynamo=True, dynamic_shapes=({0: "batch"}, {0: "batch"}), verbose=False,
        input_names=["codes", "numbers"], output_names=list(served.task_names),
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    inputs = {each.name for each in session.get_inputs()}
    assert [each.name for each in session.get_outputs()] == model.task_names

    def run(codes: Tensor, numbers: Tensor) -> dict[str, Any]:
        given = {"codes": codes.numpy(), "numbers": numbers.numpy()}
        found = session.run(None, {name: value for name, value in given.items() if name in inputs})
        return dict(zip(model.task_names, found, strict=True))

    assert_serves(run, model, rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ple", "pooled", "norms", "chain", "standardised", "columns by task"])
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    model, rows = built(name)
    program = exported(model.for_inference(), rows)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    assert_serves(torch._inductor.aoti_load_package(package), model, rows)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torch_jit_trace(name: str) -> None:
    model, rows = built(name)
    assert_serves(torch.jit.trace(model.for_inference(), tuple(rows), strict=False), model, rows)


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "eager") for name in ("ple", "pooled", "chain", "columns by task")),
     *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in ("ple", "pooled", "norms", "chain"))],
)  # fmt: skip
def test_torch_compile(name: str, backend: str) -> None:
    torch._dynamo.reset()  # it counts the programs of one forward, of whichever model
    model, rows = built(name)
    compiled = torch.compile(model.for_inference(), fullgraph=True, dynamic=True, backend=backend)
    assert_serves(compiled, model, rows)
