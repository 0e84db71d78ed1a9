"""Columns that a task must not see: nothing of them reaches it, by whatever path, or the model is not built."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ple_fast import PLE, ExtractionNetwork, GateSpec, MLPSpec, Topology
from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, MultiTaskModel, Numeric
from ple_fast.model.columns import encode
from ple_fast.model.task_columns import _paths, hidden_features
from tests.model_helpers import COLUMNS, SMALL, TASKS, model, table

NAMES = [column.name for column in COLUMNS]
ROWS = 12
RULES = {"click": ["country", "age"], "rating": ["age", "hour", "amount"]}
"""Every kind of column is hidden from some task; "watch" reads all."""
PLE_SHARED = {**SMALL["ple"], "shared_gate_scope": "shared"}
SERVES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ple": ("ple", PLE_SHARED),
    "ple, one level": ("ple", {**SMALL["ple"], "num_levels": 1}),
    "ple, three levels": ("ple", {**PLE_SHARED, "num_levels": 3}),
    "ple, nothing shared": ("ple", {**SMALL["ple"], "shared_experts": 0}),
    "cgc": ("cgc", SMALL["cgc"]),
}


def build(trunk: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> MultiTaskModel:
    torch.manual_seed(3)
    kwargs.setdefault("task_columns", RULES)
    return MultiTaskModel(COLUMNS, kwargs.pop("tasks", TASKS), trunk=trunk, trunk_options=options, **kwargs)


def changed(data: dict[str, Any], name: str) -> dict[str, Any]:
    """Other values in one column."""
    values = np.asarray(data[name])
    if name == "country":
        return {**data, name: np.where(values == "de", "fr", "de")}
    if name == "hour":
        return {**data, name: (values + 5) % 24}
    return {**data, name: np.nan_to_num(values, nan=3.0) * 2 + 1}


def column_grads(fitted: MultiTaskModel, task: str) -> dict[str, bool]:
    """By column that is embedded, whether a gradient of the task's output reaches one of its embeddings."""
    fitted.zero_grad(set_to_none=True)
    data, _ = table(ROWS)
    fitted(data)[task].square().sum().backward()
    found = {}
    part: Any
    embedding = fitted.embedding
    for pick, first, part in zip(embedding._picks, embedding._first, embedding.tables, strict=True):
        grad = part.weight.grad
        assert isinstance(grad, Tensor)
        categorical = [column for column in COLUMNS if isinstance(column, Categorical)]
        for place, start in zip(pick, first, strict=True):
            column = categorical[place]
            found[column.name] = bool((grad[start : start + column.rows] != 0).any())
    return found


@pytest.mark.parametrize("case", SERVES)
def test_what_is_hidden_has_no_gradient_and_changes_no_bit(case: str) -> None:
    fitted = build(*SERVES[case])
    data, labels = table(ROWS)
    fitted.fit(data, labels, batch_size=6)
    before = fitted.predict(data)
    for task in fitted.task_names:
        may = RULES.get(task, NAMES)
        reached = column_grads(fitted, task)
        assert reached == {name: name in may for name in reached}
        for name in NAMES:
            same = np.array_equal(fitted.predict(changed(data, name))[task], before[task])
            assert same == (name not in may), (task, name)


def test_pooled_and_shared_columns_are_hidden_by_their_own_names() -> None:
    """Features lie by width and kind, not in the order of the columns."""
    columns = (
        Numeric("age"),
        Categorical("history", share="item", pooling="mean", max_length=3),
        Categorical("tags", values=("a", "b"), width=2, pooling="max", max_length=2),
        Categorical("item", values=(1, 2, 3, 4), width=3),
        Numeric("price", width=2),
        Categorical("country", values=("de", "fr"), width=2),
    )
    data = {
        "age": [1.0, 2.0],
        "history": [[1, 2], [3]],
        "tags": [["a"], ["b", "a"]],
        "item": [1, 2],
        "price": [5.0, 1.0],
        "country": ["de", "fr"],
    }
    other = {
        "age": [3.0, 5.0],
        "history": [[4], [1, 2]],
        "tags": [["b"], ["b"]],
        "item": [3, 4],
        "price": [2.0, 7.0],
        "country": ["fr", "de"],
    }
    names = [column.name for column in columns]
    for hidden in names:
        rest = [name for name in names if name != hidden]
        torch.manual_seed(0)
        options = {**SMALL["cgc"], "activation": "tanh"}  # no unit is dead
        fitted = MultiTaskModel(columns, TASKS, trunk="cgc", trunk_options=options, task_columns={"click": rest})
        before = fitted.predict(data)
        for name in names:
            after = fitted.predict({**data, name: other[name]})
            assert np.array_equal(after["click"], before["click"]) == (name == hidden), (name, hidden)
            assert not np.array_equal(after["watch"], before["watch"])


@pytest.mark.parametrize("trunk", SMALL)
def test_every_trunk_hides_or_says_how_it_could_not(trunk: str) -> None:
    options = dict(SMALL[trunk])
    if trunk == "asymmetric_sharing":
        options["sources"] = ((0,), (0, 1), (2,))
    if trunk == "cgc":
        build(trunk, options)
        return
    with pytest.raises(ValueError, match="task_columns: ") as caught:
        build(trunk, options)
    message = str(caught.value)
    assert "would do" in message
    if trunk in ("ple", "adatt", "stem", "cross_stitch"):
        assert " -> expert " in message and "must not read" in message
    else:
        assert "no slot of its own" in message


def test_a_leak_names_column_path_and_task() -> None:
    with pytest.raises(ValueError, match=r"'click' cannot see 'hour'") as caught:
        build("ple", SMALL["ple"], task_columns={"click": ["country", "age", "amount"]})
    assert (
        "the slot of 'watch' -> expert 2 of level 0 -> mixture 3 of level 0 -> expert 6 of level 1 -> "
        "mixture 0 of level 1 -> 'click'"
    ) in str(caught.value)


def test_the_product_of_a_chain_is_a_path() -> None:
    tasks = (TaskLoss("click"), TaskLoss("buy"))
    how: dict[str, Any] = {"tasks": tasks, "given": {"buy": "click"}}
    with pytest.raises(ValueError, match=r"the output of 'click' -> given=\{'buy': 'click'\} -> 'buy'"):
        build("cgc", SMALL["cgc"], task_columns={"buy": ["age"]}, **how)
    build("cgc", SMALL["cgc"], task_columns={"click": ["age"]}, **how)  # the product may see more


@pytest.mark.parametrize("trunk", ["mmoe", "hard_sharing", "single_task"])
def test_columns_for_all_tasks_alike_are_no_use_of_slots(trunk: str) -> None:
    """With one slot the tasks must read the same columns; then some columns are read by nobody."""
    with_all = {task.name: ["age", "country"] for task in TASKS}
    narrow = build(trunk, SMALL[trunk], task_columns=with_all)
    data, _ = table(ROWS)
    before = narrow.predict(data)
    for name in NAMES:
        after = narrow.predict(changed(data, name))
        same = all(np.array_equal(after[task], before[task]) for task in before)
        assert same == (name in ("hour", "amount"))


def _random_levels(dice: random.Random, tasks: int) -> list[ExtractionNetwork]:
    slots, width = dice.choice([1, tasks, tasks + 1]), 3
    levels: list[ExtractionNetwork] = []
    count = dice.randint(1, 3)
    for number in range(count):
        experts = [slot for slot in range(slots) for _ in range(dice.randint(0, 2))] or [0]
        mixtures = tasks if number == count - 1 else dice.randint(1, 4)
        weighed = [dice.sample(range(len(experts)), dice.randint(1, len(experts))) for _ in range(mixtures)]
        weighed[-1] += [e for e in range(len(experts)) if not any(e in row for row in weighed)]
        topology = Topology(
            tuple(experts),
            tuple(dice.randrange(slots) for _ in range(mixtures)),
            tuple(map(tuple, weighed)),
            mixture_kind=tuple(dice.choice(["softmax", "static"]) for _ in range(mixtures)),
            num_slots=slots,
        )
        gate = GateSpec(input=dice.choice(["previous", "with_shared", "raw"]))
        fits = number == 0 or gate.input != "raw" or levels[0].topology.num_slots in (1, slots)
        levels.append(
            ExtractionNetwork(
                width,
                topology,
                experts=MLPSpec((width,), "tanh"),
                gate=gate if fits else GateSpec(),
                dtype=torch.float64,
            )
        )
        slots = mixtures
    return levels


@pytest.mark.parametrize("seed", range(40))
def test_paths_are_what_gradients_say(seed: int) -> None:
    dice, tasks = random.Random(seed), 2
    torch.manual_seed(seed)
    levels = _random_levels(dice, tasks)
    trunk = PLE.from_levels(levels, num_tasks=tasks)
    slots = levels[0].topology.num_slots
    assert slots is not None
    inputs = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(slots)]
    y = trunk(inputs)
    found = set()
    for task in range(tasks):
        grads: Any = torch.autograd.grad(y[:, task].square().sum(), inputs, retain_graph=True, allow_unused=True)
        found |= {(slot, task) for slot, grad in enumerate(grads) if grad is not None and bool(grad.any())}
    assert set(_paths(trunk, ["a", "b"])) == found


def test_a_trunk_of_your_own_has_to_be_of_levels() -> None:
    width = model().embedding.out_features
    levels = PLE(width, 3, shared_gate_scope="shared", expert_units=(8, 6)).levels
    build(PLE.from_levels(list(levels)))  # type: ignore[arg-type]  # a list of levels

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(width, 3 * 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y.view(-1, 3, 4)

    with pytest.raises(TypeError, match=r"task_columns: expected a trunk whose wiring is known.*got Own"):
        build(Own())
    build(Own(), task_columns={})


class Mixing(PLE):
    """Its wiring does not say all that it does."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        y = super().forward(*arguments, **options)
        return y + y.mean(1, keepdim=True)


class MixingLevel(ExtractionNetwork):
    def forward(self, *arguments: Any, **options: Any) -> Any:
        y: Any = super().forward(*arguments, **options)
        return y + y.mean(1, keepdim=True)


class Holder(nn.Module):
    """Something else that has levels."""

    def __init__(self, trunk: PLE) -> None:
        super().__init__()
        self.levels, self.trunk = trunk.levels, trunk

    def forward(self, x: Any) -> Any:
        y = self.trunk(x)
        return y + y.mean(1, keepdim=True)


def _unknown(kind: str) -> nn.Module:
    options: dict[str, Any] = {"shared_gate_scope": "shared", "expert_units": (8, 6)}
    width = model().embedding.out_features
    if kind == "subclass":
        return Mixing(width, 3, **options)
    trunk = PLE(width, 3, **options)
    if kind == "hook":
        trunk.register_forward_hook(lambda module, inputs, y: y + y.mean(1, keepdim=True))
    elif kind == "hook of a level":
        trunk.levels[1].register_forward_hook(lambda module, inputs, y: y + y.mean(1, keepdim=True))
    elif kind == "forward of the object":
        trunk.forward = lambda x: PLE.forward(trunk, x).flip(1)  # type: ignore[method-assign,assignment]
    elif kind == "level":
        trunk.levels[1].__class__ = MixingLevel
    else:
        return Holder(trunk)
    return trunk


@pytest.mark.parametrize(
    "kind", ["subclass", "hook", "hook of a level", "forward of the object", "level", "something with levels"]
)
def test_a_trunk_that_does_more_than_its_wiring_says_is_refused(kind: str) -> None:
    with pytest.raises(TypeError, match="task_columns: expected a trunk whose wiring is known"):
        build(_unknown(kind))


def test_another_trunk_must_not_leak_either() -> None:
    fitted = build("ple", PLE_SHARED)
    width, before = fitted.embedding.out_features, fitted.trunk
    with pytest.raises(ValueError, match="cannot see"):
        fitted.trunk = PLE(width, 3, expert_units=(8, 6))
    assert fitted.trunk is before
    fitted.trunk = PLE(width, 3, expert_units=(8, 6), shared_gate_scope="shared", num_levels=3)
    data, _ = table(ROWS)
    fitted.trunk = torch.compile(fitted.trunk, backend="eager")  # type: ignore[assignment]  # it is a module
    assert np.array_equal(fitted.predict(data)["click"], fitted.predict(changed(data, "hour"))["click"])
    with pytest.raises(TypeError):
        fitted.task_columns["click"] = ("hour",)  # type: ignore[index]
    assert fitted.task_columns["click"] == ("country", "age")


def test_a_slot_that_reaches_no_task_reads_what_all_may() -> None:
    first = Topology((0, 1, 2), (0, 1, 2), ((0,), (1,), (2,)), num_slots=3)
    last = Topology((0, 1), (0, 1), ((0,), (1,)), num_slots=3)
    levels = [ExtractionNetwork(4, topology, experts=MLPSpec((4,)), gate=GateSpec()) for topology in (first, last)]
    hidden = hidden_features(
        PLE.from_levels(levels, num_tasks=2), ["x", "y"], ["a", "b", "c", "c"], {"x": ["a", "c"]}, {}
    )  # fmt: skip
    assert hidden == ((False, True, False, False), (False,) * 4, (False, True, False, False))


def test_columns_may_have_numbers_as_names(tmp_path: Any) -> None:
    torch.manual_seed(0)
    columns = (Numeric(0), Numeric(1))  # type: ignore[arg-type]  # pandas numbers columns that have no names
    fitted = MultiTaskModel(
        columns, TASKS, trunk="cgc", trunk_options=SMALL["cgc"], task_columns={"click": np.array([0])}  # type: ignore[dict-item]
    )  # fmt: skip
    fitted.save(tmp_path)
    found: Any = MultiTaskModel.load(tmp_path).task_columns
    assert found == {"click": (0,)}


def test_masks_follow_the_model_to_memory_of_its_own() -> None:
    with torch.device("meta"):
        empty = build("cgc", SMALL["cgc"])
    filled = build("cgc", SMALL["cgc"])
    empty.load_state_dict(filled.state_dict(), assign=True)
    data, _ = table(ROWS)
    assert np.array_equal(empty.eval().predict(data)["click"], filled.predict(data)["click"])
    other = build("cgc", SMALL["cgc"]).to_empty(device="cpu")
    other.load_state_dict(filled.state_dict())
    assert np.array_equal(other.predict(data)["click"], filled.predict(data)["click"])
    assert not [name for name in filled.state_dict() if "slot_inputs" in name]


def test_a_checkpoint_is_not_continued_where_something_else_is_hidden(tmp_path: Any) -> None:
    data, labels = table(ROWS)
    how: dict[str, Any] = {"checkpoint": tmp_path / "run.pt", "batch_size": 6, "progress": False}
    build("cgc", SMALL["cgc"], task_columns={"click": ["age"]}).fit(data, labels, **how)
    careful = build("cgc", SMALL["cgc"])
    with pytest.raises(ValueError, match="expected its own settings"):
        careful.fit(data, labels, epochs=2, resume=True, **how)


@pytest.mark.parametrize(
    ("rules", "error", "match"),
    [
        ({"buy": ["age"]}, ValueError, "some of the tasks .*'click'.*got 'buy'"),
        ({"click": ["age", "height"]}, ValueError, r"task_columns\['click'\]: expected some of the columns .*'height'"),
        ({"click": []}, ValueError, "at least one column"),
        ({"click": ["age", "age"]}, ValueError, "each once"),
        ({"click": "age"}, TypeError, "a list of names"),
        ({"click": 3}, TypeError, "a list of names"),
        (["click"], TypeError, "task_columns: expected a dict"),
    ],
)
def test_rules_that_do_not_fit(rules: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        build("cgc", SMALL["cgc"], task_columns=rules)


@pytest.mark.parametrize("own", [False, True])
def test_a_saved_model_hides_the_same(own: bool, tmp_path: Any) -> None:
    def trunk(width: int) -> PLE:
        return PLE(width, 3, shared_gate_scope="shared", expert_units=(8, 6))

    fitted = build(trunk) if own else build("ple", PLE_SHARED)
    fitted.save(tmp_path)
    loaded = MultiTaskModel.load(tmp_path, trunk=trunk if own else None)
    data, _ = table(ROWS)
    before, after = fitted.predict(data), loaded.predict(data)
    assert all(np.array_equal(before[task], after[task]) for task in before)
    assert loaded.task_columns == {task: tuple(names) for task, names in RULES.items()}
    assert np.array_equal(loaded.predict(changed(data, "hour"))["click"], before["click"])


class Count(TorchDispatchMode):
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_it_costs_nothing_where_it_is_not_used() -> None:
    plain = model("cgc").eval()
    rows = encode(table(ROWS)[0], COLUMNS)
    with torch.no_grad(), Count() as whole:
        plain(rows)
    with torch.no_grad(), Count() as parts:
        plain._outputs(plain.trunk(plain.embedding(rows)))
    assert plain.slot_inputs is None
    assert whole.names == parts.names


def test_slots_that_read_the_same_share_one_tensor() -> None:
    fitted = build("cgc", SMALL["cgc"], task_columns={"click": ["age"]})
    inputs = fitted._features(encode(table(ROWS)[0], COLUMNS))
    assert isinstance(inputs, list) and len(inputs) == 4
    assert inputs[1] is inputs[2] and inputs[0] is inputs[3] is not inputs[1]
    fitted.half()
    assert all(view.dtype == torch.float16 for view in fitted._features(encode(table(ROWS)[0], COLUMNS)))


def test_gates_and_compiled_models_read_the_same() -> None:
    fitted = build("ple", PLE_SHARED).eval()
    data, _ = table(ROWS)
    gates, other = fitted.gate_weights(data), fitted.gate_weights(changed(data, "hour"))
    assert torch.equal(gates[0][0], other[0][0]) and not torch.equal(gates[0][1], other[0][1])
    rows = encode(data, COLUMNS)
    with torch.no_grad():
        expected, found = fitted(rows), torch.compile(fitted, backend="eager")(rows)
    for task in expected:
        torch.testing.assert_close(found[task], expected[task])


def test_nothing_hidden_overflows_into_a_task() -> None:
    """What is hidden is 0, not multiplied by 0."""
    fitted = build("cgc", SMALL["cgc"])
    for part in fitted.embedding.tables:
        assert isinstance(part, nn.Embedding)
        nn.init.constant_(part.weight, torch.inf)
    features = fitted._features(encode(table(ROWS)[0], COLUMNS))
    assert torch.isfinite(features[0][:, [name == "hour" for name in fitted.embedding.feature_columns]]).all()


def test_the_rules_of_all_pairs_agree_with_the_slots() -> None:
    trunk = PLE(4, 2, shared_gate_scope="shared", expert_units=(4,))
    for first, second in itertools.product((("a",), ("a", "b"), ("b",)), repeat=2):
        hidden = hidden_features(trunk, ["x", "y"], ["a", "b", "b", "a"], {"x": first, "y": second}, {})
        shared = set(first) & set(second)
        rows = [tuple(name not in names for name in "abba") for names in (first, second, shared)]
        assert hidden == tuple(rows)
