"""The joint loss against eq. 8-10 written out in Python numbers, sample by sample; missing labels; ESMM; two ranks."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ple_fast.losses import JointLoss, JointLossResult, TaskLoss, entire_space
from tests.ranks import run_ranks

NAN = float("nan")
MIXED = (
    TaskLoss("click", weight=0.5, gamma=0.9),
    TaskLoss("minutes", "regression", weight=2.0),
    TaskLoss("rating", "multiclass", num_classes=3, gamma=1.5),
)
Batch = dict[str, Tensor]


def sample_loss(task: TaskLoss, prediction: list[float], label: float) -> float:
    """The loss of one sample from the formula, in Python's double precision."""
    if task.kind == "regression":
        return (prediction[0] - label) ** 2
    if task.kind == "binary":
        p = 1 / (1 + math.exp(-prediction[0]))
        return -(label * math.log(p) + (1 - label) * math.log(1 - p))
    return -math.log(math.exp(prediction[int(label)]) / sum(map(math.exp, prediction)))


def joint_loss(tasks: tuple[TaskLoss, ...], predictions: Batch, labels: Batch, masks: Batch, epoch: int) -> float:
    """Eq. 8-10 as loops over tasks and samples."""
    total = 0.0
    for task in tasks:
        mask = masks.get(task.name, torch.ones(len(labels[task.name]), dtype=torch.bool)).flatten().tolist()
        losses = [
            sample_loss(task, prediction, label)
            for prediction, label, inside in zip(
                predictions[task.name].reshape(len(mask), task.num_outputs).tolist(),
                labels[task.name].flatten().tolist(),
                mask,
                strict=True,
            )
            if inside and not math.isnan(label) and not (task.kind == "multiclass" and label == -1)
        ]
        total += task.weight * task.gamma**epoch * (sum(losses) / len(losses) if losses else 0.0)
    return total


def draw_labels(task: TaskLoss, batch: int, missing: float, column: bool = False) -> Tensor:
    if task.kind == "multiclass":
        label = torch.randint(0, task.num_outputs, (batch,))
        label[torch.rand(batch) < missing] = -1
    else:
        label = torch.randn(batch) if task.kind == "regression" else torch.randint(0, 2, (batch,)).float()
        label[torch.rand(batch) < missing] = NAN
    return label.unsqueeze(1) if column else label


def draw_predictions(task: TaskLoss, batch: int, column: bool = False) -> Tensor:
    shape = (batch, task.num_outputs) if column or task.num_outputs > 1 else (batch,)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@given(
    kinds=st.lists(st.sampled_from(["binary", "regression", "multiclass"]), min_size=1, max_size=4),
    batch=st.integers(0, 9),
    missing=st.sampled_from([0.0, 0.5, 1.0]),
    masked=st.booleans(),
    column=st.booleans(),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_the_joint_loss_is_the_papers(
    kinds: list[Any], batch: int, missing: float, masked: bool, column: bool, epoch: int, seed: int
) -> None:
    torch.manual_seed(seed)
    tasks = tuple(
        TaskLoss(f"task {k}", kind, 4 if kind == "multiclass" else None, weight=0.5 + k, gamma=0.8 + 0.2 * k)
        for k, kind in enumerate(kinds)
    )
    predictions = {task.name: draw_predictions(task, batch, column) for task in tasks}
    labels = {task.name: draw_labels(task, batch, missing, column) for task in tasks}
    masks = {task.name: torch.rand(batch) < 0.6 for task in tasks[1:]} if masked else {}
    loss = JointLoss(tasks)
    for _ in range(epoch):
        loss.step_epoch()
    result = loss(predictions, labels, masks)
    torch.testing.assert_close(
        result.total.item(), joint_loss(tasks, predictions, labels, masks, epoch), rtol=1e-6, atol=1e-9
    )
    result.total.backward()
    for task in tasks:  # the gradient by central differences of the same loops
        given_ = predictions[task.name]
        assert given_.grad is not None
        for i in range(given_.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = given_.detach().clone()
                moved.view(-1)[i] += step
                ends.append(joint_loss(tasks, {**predictions, task.name: moved}, labels, masks, epoch))
            torch.testing.assert_close(float(given_.grad.view(-1)[i]), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-7)


def test_each_task_is_averaged_over_its_own_sample_space() -> None:
    result = JointLoss([TaskLoss("a", "regression", weight=3.0), TaskLoss("b", "regression")])(
        {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([1.0, 2.0, 3.0])},
        {"a": torch.tensor([0.0, NAN, NAN]), "b": torch.tensor([NAN, 0.0, 0.0])},
        {"b": torch.tensor([True, True, False])},
    )
    assert {name: value.item() for name, value in result.per_task.items()} == {"a": 1.0, "b": 4.0}
    assert {name: int(value) for name, value in result.counts.items()} == {"a": 1, "b": 1}
    assert result.total.item() == 3.0 * 1.0 + 4.0


@pytest.mark.parametrize("kind", ["binary", "regression", "multiclass"])
@pytest.mark.parametrize("empty_by", ["labels", "mask", "batch of 0"])
@pytest.mark.parametrize("value", [0.3, NAN, float("inf"), 1e38])
def test_an_empty_sample_space_contributes_exactly_0(kind: Any, empty_by: str, value: float) -> None:
    task = TaskLoss("empty", kind, 3 if kind == "multiclass" else None)
    batch = 0 if empty_by == "batch of 0" else 4
    prediction = torch.full((batch, task.num_outputs), value, requires_grad=True)
    label = torch.full((batch,), NAN) if empty_by == "labels" else torch.zeros(batch)
    masks = {"empty": torch.zeros(batch, dtype=torch.bool)} if empty_by == "mask" else None
    other = torch.tensor([2.0], requires_grad=True)
    result = JointLoss([task, TaskLoss("other", "regression")])(
        {"empty": prediction, "other": other}, {"empty": label, "other": torch.zeros(1)}, masks
    )
    assert result.per_task["empty"].item() == 0.0
    assert result.total.item() == 4.0
    result.total.backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))
    assert other.grad is not None and float(other.grad) == 4.0


@pytest.mark.parametrize("task", MIXED, ids=lambda task: task.kind)
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_predictions_outside_the_sample_space_reach_neither_loss_nor_gradients(task: TaskLoss, bad: float) -> None:
    clean = draw_predictions(task, 5).detach()
    label = draw_labels(task, 5, 0.0)
    mask = torch.tensor([True, False, True, True, False])
    poisoned = clean.clone()
    poisoned[~mask] = bad
    results, gradients = [], []
    for prediction in (clean, poisoned):
        prediction.requires_grad_()
        results.append(JointLoss([task])({task.name: prediction}, {task.name: label}, {task.name: mask}).total)
        results[-1].backward()
        assert prediction.grad is not None
        gradients.append(prediction.grad)
    assert torch.equal(*results)
    assert torch.equal(*gradients)
    assert not gradients[1][~mask].any()


def test_nan_inside_the_sample_space_is_not_hidden() -> None:
    result = JointLoss([TaskLoss("a")])({"a": torch.tensor([NAN, 1.0])}, {"a": torch.tensor([1.0, 1.0])})
    assert result.total.isnan()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
def test_minus_1_and_nan_are_missing_classes(dtype: torch.dtype) -> None:
    classes = torch.tensor([2, 0, 2, 1] if dtype == torch.uint8 else [2, -1, 2, 1]).to(dtype)
    mask = torch.tensor([True, False, True, True])
    logits = torch.randn(4, 3)
    expected = nn.functional.cross_entropy(logits[mask], torch.tensor([2, 2, 1]))
    loss = JointLoss([TaskLoss("m", "multiclass", 3)])
    masks = {"m": mask} if dtype == torch.uint8 else None
    result = loss({"m": logits}, {"m": classes}, masks)
    torch.testing.assert_close(result.total, expected)
    assert int(result.counts["m"]) == 3
    if dtype.is_floating_point:
        classes[1] = NAN
        torch.testing.assert_close(loss({"m": logits}, {"m": classes}).total, expected)
        loss.check_labels({"m": classes})


def test_a_byte_of_255_is_no_missing_class() -> None:
    label = torch.tensor([255, 1], dtype=torch.uint8)
    assert int(JointLoss([TaskLoss("m", "multiclass", 256)])({"m": torch.zeros(2, 256)}, {"m": label}).counts["m"]) == 2


def test_minus_1_is_a_value_in_a_regression() -> None:
    label = torch.tensor([-1, 3])
    result = JointLoss([TaskLoss("r", "regression")])({"r": torch.zeros(2)}, {"r": label})
    assert result.total.item() == 5.0


def test_weights_are_stepped_per_epoch() -> None:
    loss = JointLoss(MIXED)
    predictions = {task.name: draw_predictions(task, 6) for task in MIXED}
    labels = {task.name: draw_labels(task, 6, 0.2) for task in MIXED}
    for epoch in range(4):
        expected = {task.name: task.weight * task.gamma**epoch for task in MIXED}
        assert loss.weights() == pytest.approx(expected, rel=1e-12)
        result = loss(predictions, labels)
        terms = [expected[name] * value.item() for name, value in result.per_task.items()]
        assert result.total.item() == pytest.approx(sum(terms), rel=1e-6)
        loss.step_epoch()


def test_the_epoch_is_a_buffer() -> None:
    loss = JointLoss(MIXED)
    loss.step_epoch()
    loss.step_epoch()
    assert list(loss.state_dict()) == ["epoch"]
    resumed = JointLoss(MIXED)
    resumed.load_state_dict(loss.state_dict())
    assert resumed.weights() == copy.deepcopy(loss).half().weights() == loss.weights()
    assert not list(loss.parameters())
    with torch.device("meta"):
        deferred = JointLoss(MIXED)
    deferred.to_empty(device="cpu").reset_parameters()
    assert deferred.weights() == JointLoss(MIXED).weights()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_computed_in_float32(dtype: torch.dtype) -> None:
    low = {task.name: (4 * draw_predictions(task, 64).detach()).to(dtype).requires_grad_() for task in MIXED}
    high = {name: value.detach().float().requires_grad_() for name, value in low.items()}
    labels = {task.name: draw_labels(task, 64, 0.3) for task in MIXED}
    loss = JointLoss(MIXED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(low, labels)
    expected = loss(high, labels)
    assert result.total.dtype == torch.float32
    assert torch.equal(result.total, expected.total)
    result.total.backward()
    expected.total.backward()
    for name, value in low.items():
        grad = high[name].grad
        assert grad is not None and value.grad is not None
        assert value.grad.dtype == dtype
        assert torch.equal(value.grad, grad.to(dtype))


def test_a_compiled_loss_is_one_graph_that_serves_every_epoch() -> None:
    loss = JointLoss(MIXED)
    predictions = {task.name: draw_predictions(task, 7) for task in MIXED}
    labels = {task.name: draw_labels(task, 7, 0.3) for task in MIXED}
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(compiled(predictions, labels), loss(predictions, labels), rtol=0, atol=0)
        loss.step_epoch()
    assert len(graphs) == 1


# ESMM


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_entire_space_is_the_logit_of_the_product(dtype: torch.dtype) -> None:
    a, b = (2 * torch.randn(2, 500)).to(dtype)
    p = a.double().sigmoid() * b.double().sigmoid()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logit = entire_space(a, b)
    assert logit.dtype == wide
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(logit.double(), torch.log(p / (1 - p)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("a", [-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30])
@pytest.mark.parametrize("b", [-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_extreme_logits_of_the_entire_space_give_finite_losses_and_gradients(a: float, b: float, label: float) -> None:
    logits = torch.tensor([[a], [b]], requires_grad=True)
    loss = JointLoss([TaskLoss("ctcvr")])
    total = loss({"ctcvr": entire_space(logits[0], logits[1])}, {"ctcvr": torch.tensor([label])}).total
    # -log p is -(log sigmoid(a) + log sigmoid(b)); where p is tiny -log(1 - p) is p.
    minus_log_p = sum(max(-x, 0.0) + math.log1p(math.exp(-abs(x))) for x in (a, b))
    if label == 1:
        assert total.item() == pytest.approx(minus_log_p, rel=1e-6, abs=1e-37)
    elif minus_log_p > 50:
        assert total.item() == pytest.approx(math.exp(-minus_log_p), rel=1e-3, abs=1e-37)
    total.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad * (1 - 2 * label) >= 0).all()  # a conversion raises both, none lowers both
    # d(-log p)/da = -sigmoid(-a), and d(-log(1 - p))/da = p sigmoid(-a) / (1 - p) = sigmoid(logit p) - p sigmoid(a)
    p = math.exp(-minus_log_p)
    for x, got in ((a, logits.grad[0].item()), (b, logits.grad[1].item())):
        sigmoid = 1 / (1 + math.exp(min(x, 700.0)))
        if label == 1:
            assert got == pytest.approx(-sigmoid, rel=1e-6, abs=1e-37)
        elif p < 0.9:
            assert got == pytest.approx(p * sigmoid / (1 - p), rel=1e-3, abs=1e-37)


def test_gradients_of_the_entire_space() -> None:
    # Ties and zeros, as untrained towers give them, are where minimum and relu have kinks and the function has none.
    values = torch.tensor([-2.0, -1.0, 0.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    a, b = (x.flatten().requires_grad_() for x in torch.meshgrid(values, values, indexing="ij"))
    assert torch.autograd.gradcheck(entire_space, (a, b))


def test_entire_space_trains_both_towers_on_all_impressions() -> None:
    a, b = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    click = torch.tensor([0.0, 0, 1, 1, 1, 0])
    result = JointLoss([TaskLoss("ctr"), TaskLoss("ctcvr")])(
        {"ctr": a, "ctcvr": entire_space(a, b)}, {"ctr": click, "ctcvr": click * torch.tensor([0, 0, 0, 1, 0, 0])}
    )
    result.total.backward()
    assert b.grad is not None
    assert (b.grad != 0).all(), "the conversion tower learns from impressions without a click as well"


def test_weights_have_the_precision_of_float64_predictions() -> None:
    tasks = (TaskLoss("a", "regression", weight=0.1, gamma=0.9), TaskLoss("b", "regression", weight=0.3, gamma=1.1))
    loss = JointLoss(tasks)
    for _ in range(7):
        loss.step_epoch()
    result = loss(
        {"a": torch.full((3,), 2.0, dtype=torch.float64), "b": torch.full((3,), 3.0, dtype=torch.float64)},
        {"a": torch.zeros(3), "b": torch.zeros(3)},
    )
    assert result.total.item() == pytest.approx(0.1 * 0.9**7 * 4 + 0.3 * 1.1**7 * 9, rel=1e-15)


def test_unlabelled_tasks_are_named_whatever_marks_a_missing_label() -> None:
    tasks = (*MIXED, TaskLoss("other", "multiclass", num_classes=2))
    labels = {
        "click": torch.tensor([NAN, NAN]),
        "minutes": torch.tensor([NAN, 1.0]),
        "rating": torch.tensor([-1, -1]),
        "other": torch.tensor([NAN, -1.0]),
    }
    assert JointLoss(tasks).unlabelled(labels) == ["click", "rating", "other"]
    assert JointLoss(tasks).unlabelled(labels | {"rating": torch.tensor([2, -1])}) == ["click", "other"]


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"name": 3}, TypeError, "expected a string, got 3"),
        ({"kind": "ranking"}, ValueError, "binary, regression, multiclass, got 'ranking'"),
        ({"kind": "multiclass"}, ValueError, "num_classes of kind='multiclass': expected 2 or more, got None"),
        ({"kind": "multiclass", "num_classes": 1}, ValueError, "expected 2 or more, got 1"),
        ({"num_classes": 2}, ValueError, "leave it out for 'binary'"),
        ({"weight": 0.0}, ValueError, "finite weight above 0, got 0.0"),
        ({"weight": -1}, ValueError, "finite weight above 0, got -1"),
        ({"weight": NAN}, ValueError, "finite weight above 0, got nan"),
        ({"gamma": 0}, ValueError, "finite gamma above 0, got 0"),
        ({"gamma": float("inf")}, ValueError, "finite gamma above 0, got inf"),
        ({"weight": "2"}, TypeError, "'a': weight: expected a number, got '2'"),
        ({"gamma": torch.ones(1)}, TypeError, "gamma: expected a number, got Tensor of shape"),
        ({"kind": "multiclass", "num_classes": 3.0}, TypeError, "num_classes.*: expected an int, got 3.0"),
        ({"kind": "multiclass", "num_classes": True}, TypeError, "num_classes.*: expected an int, got True"),
        ({"kind": "multiclass", "num_classes": np.True_}, TypeError, "num_classes.*: expected an int, got"),
    ],
)
def test_a_task_that_cannot_be_is_refused(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        TaskLoss(**{"name": "a", **arguments})


@pytest.mark.parametrize("scalar", [np.float32, np.float64, np.float16, torch.tensor, np.array])
def test_scalar_options_of_other_libraries_are_numbers(scalar: Any) -> None:
    task = TaskLoss("a", weight=scalar(0.5), gamma=scalar(0.25))
    assert task == TaskLoss("a", weight=0.5, gamma=0.25)
    assert (type(task.weight), type(task.gamma)) == (float, float)


@pytest.mark.parametrize("scalar", [np.int64, np.uint8, torch.tensor, np.array])
def test_counts_of_other_libraries_are_ints(scalar: Any) -> None:
    task = TaskLoss("a", "multiclass", num_classes=scalar(3), weight=scalar(2))
    assert task == TaskLoss("a", "multiclass", num_classes=3, weight=2.0)
    assert (type(task.num_classes), type(task.weight)) == (int, float)


@pytest.mark.parametrize(
    "given", [torch.zeros(4, 2), [torch.zeros(4)], (torch.zeros(4),)], ids=["tensor", "list", "tuple"]
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_named_by_task_is_refused_in_a_sentence(given: Any, place: int) -> None:
    arguments: list[Any] = [{"a": torch.zeros(4)}, {"a": torch.zeros(4)}, None]
    arguments[place] = given
    with pytest.raises(
        TypeError, match=r"(predictions|labels|masks): expected tensors by task, such as \{'a': tensor\}"
    ):
        JointLoss([TaskLoss("a")])(*arguments)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_tensor_is_refused_in_a_sentence(place: int) -> None:
    arguments: list[Any] = [{"a": torch.zeros(4)}, {"a": torch.zeros(4)}, {"a": torch.ones(4, dtype=torch.bool)}]
    arguments[place] = {"a": np.zeros(4)}
    with pytest.raises(TypeError, match=r"(predictions|labels|masks)\['a'\]: expected a tensor, got ndarray"):
        JointLoss([TaskLoss("a")])(*arguments)


def test_whole_label_columns_are_refused_in_sentences() -> None:
    loss = JointLoss([TaskLoss("a")])
    given: list[tuple[Any, str]] = [
        (torch.zeros(4, 1), r"labels: expected tensors by task, such as \{'a': tensor\}, got Tensor"),
        ({"a": np.zeros(4)}, r"labels\['a'\]: expected a tensor, got ndarray"),
    ]
    for labels, says in given:
        with pytest.raises(TypeError, match=says):
            loss.check_labels(labels)
    logit: Any = 0.5
    with pytest.raises(TypeError, match="cvr_logit: expected a tensor, got float"):
        entire_space(torch.zeros(2), logit)


def test_tasks_are_at_least_one_and_named_apart() -> None:
    with pytest.raises(ValueError, match="at least one TaskLoss"):
        JointLoss([])
    with pytest.raises(ValueError, match=r"unique names, got \['a', 'b', 'a'\]"):
        JointLoss([TaskLoss("a"), TaskLoss("b"), TaskLoss("a", "regression")])
    with pytest.raises(TypeError, match="expected TaskLoss, got 'a'"):
        JointLoss(["a"])  # type: ignore[list-item]  # what is tested


@pytest.mark.parametrize(
    ("predictions", "labels", "masks", "error", "match"),
    [
        ({"a": None}, {}, {}, ValueError, r"predictions: expected an entry for task 'a', got \['m'\]"),
        ({}, {"m": None}, {}, ValueError, r"labels: expected an entry for task 'm', got \['a'\]"),
        ({"z": torch.zeros(4)}, {}, {}, ValueError, r"predictions: there is no task 'z', the tasks are \['a', 'm'\]"),
        ({}, {}, {"z": torch.ones(4).bool()}, ValueError, "masks: there is no task 'z'"),
        ({"a": torch.zeros(4, 2)}, {}, {}, ValueError, r"predictions\['a'\]: expected shape \(B,\) or \(B, 1\), got"),
        ({"a": torch.zeros(())}, {}, {}, ValueError, r"or \(B, 1\), got \(\)"),
        ({"m": torch.zeros(4)}, {}, {}, ValueError, r"expected logits \(B, 3\), got shape \(4,\)"),
        ({"m": torch.zeros(4, 2)}, {}, {}, ValueError, r"expected logits \(B, 3\), got shape \(4, 2\)"),
        ({"a": torch.zeros(4).long()}, {}, {}, TypeError, "expected floating binary outputs, got torch.int64"),
        ({}, {"a": torch.zeros(3)}, {}, ValueError, r"labels\['a'\]: expected as many samples .* \(4\), got 3"),
        ({}, {"a": torch.zeros(1)}, {}, ValueError, r"\(4\), got 1"),
        ({}, {"a": torch.zeros(4, dtype=torch.complex64)}, {}, TypeError, "expected a real dtype, got torch.complex64"),
        ({}, {"m": torch.zeros(4, 3)}, {}, ValueError, r"labels\['m'\]: expected shape \(B,\) or"),
        ({}, {}, {"a": torch.ones(4)}, TypeError, r"masks\['a'\]: expected bool, got torch.float32"),
        ({}, {}, {"m": torch.ones(5).bool()}, ValueError, r"masks\['m'\]: expected as many .* got 5"),
        ({}, {"a": torch.zeros(4, device="meta")}, {}, ValueError, "device of the predictions, cpu, got meta"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    predictions: dict[str, Any],
    labels: dict[str, Any],
    masks: dict[str, Any],
    error: type[Exception],
    match: str,
) -> None:
    loss = JointLoss([TaskLoss("a"), TaskLoss("m", "multiclass", 3)])
    good = ({"a": torch.zeros(4), "m": torch.zeros(4, 3)}, {"a": torch.zeros(4), "m": torch.zeros(4).long()})
    changed = [
        {name: value for name, value in {**before, **change}.items() if value is not None}
        for before, change in zip(good, (predictions, labels), strict=True)
    ]
    assert loss(*good).total.isfinite()
    with pytest.raises(error, match=match):
        loss(*changed, masks)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (
            {"click": torch.tensor([1.0, -1.0])},
            r"labels\['click'\]: expected labels from 0 to 1.*got 1 others.*\[-1.0\]",
        ),
        ({"click": torch.tensor([0, 2])}, r"such as \[2.0\]"),
        ({"minutes": torch.tensor([1.0, float("inf")])}, r"expected finite labels.*\[inf\]"),
        ({"rating": torch.tensor([0, 3])}, r"expected classes 0 to 2.*\[3.0\]"),
        ({"rating": torch.tensor([0, -2])}, r"\[-2.0\]"),
        ({"rating": torch.tensor([0.5, NAN])}, r"\[0.5\]"),
        ({"rating": None}, "expected an entry for task 'rating'"),
    ],
)
def test_check_labels_finds_values_that_no_task_can_have(labels: dict[str, Tensor | None], match: str) -> None:
    good = {
        "click": torch.tensor([0.0, 1.0, 0.3, NAN]),
        "minutes": torch.tensor([-1.0, NAN]),
        "rating": torch.tensor([0, 1, 2, -1]),
    }
    loss = JointLoss(MIXED)
    loss.check_labels(good)
    loss.check_labels({**good, "click": torch.tensor([True, False]), "rating": torch.tensor([2], dtype=torch.uint8)})
    with pytest.raises(ValueError, match=match):
        loss.check_labels({name: value for name, value in {**good, **labels}.items() if value is not None})


def test_logits_of_the_entire_space_have_one_shape() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(4,\) and \(4, 1\)"):
        entire_space(torch.zeros(4), torch.zeros(4, 1))
    with pytest.raises(TypeError, match=r"cvr_logit: expected floating logits, got torch\.int64"):
        entire_space(torch.zeros(4), torch.zeros(4).long())


# Ranks

RANKS = 2
BATCH = 6


def two_heads() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(3, 2, dtype=torch.float64)


def shards() -> tuple[Tensor, Batch]:
    """Rows of all ranks. "rare" has one label, on rank 0; "common" lacks one, on rank 1."""
    torch.manual_seed(2)
    x = torch.randn(RANKS * BATCH, 3, dtype=torch.float64)
    rare = torch.full((RANKS * BATCH,), NAN)
    rare[2] = 1.0
    common = torch.randn(RANKS * BATCH)
    common[-1] = NAN
    return x, {"rare": rare, "common": common}


def run_rank() -> tuple[JointLossResult, Tensor]:
    model = nn.parallel.DistributedDataParallel(two_heads())
    loss = JointLoss([TaskLoss("rare", weight=0.3), TaskLoss("common", "regression")], process_group=dist.group.WORLD)
    x, labels = shards()
    mine = slice(dist.get_rank() * BATCH, (dist.get_rank() + 1) * BATCH)
    rare, common = model(x[mine]).unbind(1)
    result = loss({"rare": rare, "common": common}, {name: label[mine] for name, label in labels.items()})
    result.total.backward()
    return result, model.module.weight.grad


def test_two_ranks_average_over_the_sample_spaces_of_both() -> None:
    ranks = run_ranks(RANKS, run_rank)
    model = two_heads()
    x, labels = shards()
    rare, common = model(x).unbind(1)
    whole = JointLoss([TaskLoss("rare", weight=0.3), TaskLoss("common", "regression")])(
        {"rare": rare, "common": common}, labels
    )
    whole.total.backward()
    torch.testing.assert_close(sum(result.total for result, _ in ranks) / RANKS, whole.total.detach())
    for result, gradient in ranks:
        assert {name: int(count) for name, count in result.counts.items()} == {"rare": 1, "common": 11}
        torch.testing.assert_close(gradient, model.weight.grad)
    for name, value in whole.per_task.items():
        torch.testing.assert_close(sum(result.per_task[name] for result, _ in ranks) / RANKS, value.detach())
