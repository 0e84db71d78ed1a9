"""LibMTL: the subclasses of its trainer, what weightings read and write, encoders of the user, and what is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import ple_fast
from ple_fast import PLE, ExtractionNetwork, GateSpec, MLPSpec, Topology, accelerate, restore
from ple_fast.convert import from_libmtl, to_libmtl
from tests.peers import libmtl, torcheasyrec
from tests.peers.libmtl import CGC, EW, MGDA, WIDTH, Encoder, MMoE, MoCo, PCGrad, layers, model
from tests.swap_proof import ROWS, assert_near, assert_same_state, grads, shaken

TASKS = ("c", "a", "b")
ARCHITECTURES = [(MMoE, [3]), (CGC, [2, 1, 3, 1])]
EACH = pytest.mark.parametrize(("cls", "experts"), ARCHITECTURES, ids=["MMoE", "CGC"])


def encoder() -> nn.Module:
    return Encoder(*layers(6, 5))


def made(cls: type[nn.Module], experts: list[int], weighting: Any = EW, **options: Any) -> Any:
    """A model in float64, as LibMTL's trainer makes it."""
    torch.manual_seed(0)
    given = {"tasks": TASKS, "weighting": weighting, "encoder_class": encoder, "out": 5, **options}
    return shaken(model(cls, experts, **given)).double()


def batch(step: int = 0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(step)
    given: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return torch.randn(ROWS, WIDTH, **given), [torch.randn(ROWS, 1 + t, **given) for t in range(3)]


def losses_of(net: Any, step: int = 0) -> Tensor:
    x, targets = batch(step)
    outputs = net(x)
    assert list(outputs) == list(net.task_name)
    return torch.stack([(outputs[task] - y).square().mean() for task, y in zip(TASKS, targets, strict=True)])


def trained(net: Any, optimizer: torch.optim.Optimizer, steps: range) -> Tensor:
    rows = []
    for step in steps:
        losses = losses_of(net, step)
        rows.append(losses.detach())
        optimizer.zero_grad(set_to_none=False)
        net.backward(losses)
        optimizer.step()
    return torch.stack(rows)


def why_left(net: nn.Module) -> str:
    report = accelerate(net)
    assert not report.replaced
    return report.left[0].why


@EACH
@pytest.mark.parametrize(
    ("weighting", "rep_grad"),
    [(EW, False), (EW, True), (PCGrad, False), (MGDA, False), (MGDA, True), (MoCo, False)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_weightings_train_as_ever_and_go_on_after_a_swap_in_either_direction(
    cls: type[nn.Module], experts: list[int], weighting: type[libmtl.AbsWeighting], rep_grad: bool
) -> None:
    original, fused = (made(cls, experts, weighting, rep_grad=rep_grad) for _ in range(2))
    optimizer, other = (torch.optim.Adam(net.parameters(), lr=0.01) for net in (original, fused))
    swaps: list[Callable[..., Any]] = [lambda net, **_: None, accelerate, restore, accelerate]
    for i, swap in enumerate(swaps):
        swap(fused, optimizers=other)
        steps = range(3 * i, 3 * i + 3)
        torch.testing.assert_close(trained(fused, other, steps), trained(original, optimizer, steps), rtol=1e-9, atol=0)
    restore(fused, optimizers=other)
    assert_near(fused.state_dict(), original.state_dict(), 1e-9)
    assert_near(grads(fused), grads(original), 1e-9)


@EACH
def test_shared_parameters_are_those_of_the_shared_experts_alone(cls: type[nn.Module], experts: list[int]) -> None:
    net = made(cls, experts)
    fused = copy.deepcopy(net)
    accelerate(fused, strict=True)
    shared = list(fused.get_share_params())
    assert all(isinstance(p, nn.Parameter) for p in shared)
    assert sum(p.numel() for p in shared) == sum(p.numel() for p in net.get_share_params())
    (report,) = accelerate(copy.deepcopy(net), strict=True).replaced
    held = {id(p): name for name, p in fused.named_parameters()}
    assert all(name.startswith("experts_shared.") for p in shared for name in report.parameters[held[id(p)]])
    norms = []
    for model_ in (net, fused):
        vectors = [
            torch.autograd.grad(loss, model_.get_share_params(), retain_graph=True) for loss in losses_of(model_)
        ]
        rows = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in vectors])
        norms.append(rows @ rows.T)
    torch.testing.assert_close(norms[1], norms[0])


@EACH
def test_gradients_of_the_shared_experts_become_zero_and_others_stay(cls: type[nn.Module], experts: list[int]) -> None:
    net = made(cls, experts)
    accelerate(net, strict=True)
    net.zero_grad_share_params()
    losses_of(net).sum().backward()
    held = [p.grad for p in net.get_share_params()]
    net.zero_grad_share_params()
    shared = {id(p) for p in net.get_share_params()}
    assert all(p.grad is grad for p, grad in zip(net.get_share_params(), held, strict=True))
    for p in net.parameters():
        assert p.grad is not None
        assert bool(p.grad.any()) != (id(p) in shared)


def test_a_comparison_parameter_by_parameter_cannot_go_on_with_other_parameters() -> None:
    net = made(MMoE, [2], PCGrad)
    net._compute_grad_dim()
    net.k_idx = net.grad_index
    for swap in (accelerate, restore):
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match="k_idx: GradVac has begun to compare gradients parameter by parameter"):
            swap(net)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        del net.k_idx, net.grad_index
        accelerate(net)
        net._compute_grad_dim()
        net.k_idx = net.grad_index


@EACH
def test_a_call_of_one_task_gives_that_task(cls: type[nn.Module], experts: list[int]) -> None:
    net = made(cls, experts)
    x, _ = batch()
    expected = net(x)
    accelerate(net, strict=True)
    for task in TASKS:
        found = net(x, task)
        assert list(found) == [task]
        torch.testing.assert_close(found[task], expected[task])
    assert net(x, task_name="none") == {}
    net.task_name = ["b", "c"]  # of which the gates are found by name
    found = net(x)
    assert list(found) == ["b", "c"]
    torch.testing.assert_close(found["b"], expected["b"])


@EACH
def test_a_call_of_one_task_moves_no_statistics_that_libmtl_leaves(cls: type[nn.Module], experts: list[int]) -> None:
    net = made(cls, experts, encoder_class=lambda: nn.Sequential(*layers(6, 5, norm=True)))
    fused = copy.deepcopy(net)
    accelerate(fused, strict=True)
    x, _ = batch()
    before = copy.deepcopy(fused.state_dict())
    if cls is CGC:
        with pytest.raises(ValueError, match="task_name: in train mode a fused level moves the statistics of all"):
            fused(x, "a")
        assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())
    else:
        torch.testing.assert_close(fused(x, "a"), net(x, "a"))
        assert_near(fused.state_dict(), net.state_dict(), 1e-9)
    torch.testing.assert_close(fused.eval()(x, "a"), net.eval()(x, "a"))


@EACH
def test_the_trainers_model_is_swapped_in_place_and_back(cls: type[nn.Module], experts: list[int]) -> None:
    decoders: Any = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})
    trainer: Any = libmtl.Trainer(
        dict.fromkeys(TASKS), "MoCo", cls.__name__, encoder, decoders, False, False, {"lr": 0.01}, {"step_size": 2},
        arch_args={"img_size": [WIDTH], "num_experts": experts},
    )  # fmt: skip
    net, before = trainer.model, copy.deepcopy(trainer.model)
    report = accelerate(net, optimizers=trainer.optimizer, strict=True)
    assert report.replaced[0].library == f"LibMTL {cls.__name__}"
    assert isinstance(net, (cls, MoCo))
    assert "MoCo" in [base.__name__ for base in type(net).__bases__]  # which LibMTL's own weightings ask for
    assert_same_state(copy.deepcopy(net), before)
    assert restore(net, optimizers=trainer.optimizer) == ("",)
    assert type(net) is type(before)
    assert_same_state(net, before)
    assert [type(module) for module in net.modules()] == [type(module) for module in before.modules()]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers(6, 5, norm=True, dropout=0.5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x.reshape(len(x), -1))
        return y


class Scaled(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Dropped(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Failing(Normed):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("only words")


class Two(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 5)


class Owner(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 2, 3))


@EACH
def test_encoders_of_the_user_run_fused_with_norm_and_dropout(cls: type[nn.Module], experts: list[int]) -> None:
    net = made(cls, experts, encoder_class=Normed).eval()
    x, _ = batch()
    state = torch.get_rng_state()
    fused = copy.deepcopy(net)
    accelerate(fused, strict=True)
    trunk = from_libmtl(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(buffer.any() for name, buffer in net.named_buffers() if name.endswith("num_batches_tracked"))
    expected = net(x)
    for i, (task, y) in enumerate(fused(x).items()):
        torch.testing.assert_close(y, expected[task])
        torch.testing.assert_close(net.decoders[task](trunk.eval()(x)[:, i]), expected[task])


@EACH
@pytest.mark.parametrize(
    ("encoder_class", "why"),
    [
        (Scaled, "in eval mode its forward computes something else than its Sequential alone"),
        (Dropped, "in train mode its forward computes something else than its Sequential alone"),
        (Two, "expected an nn.Sequential, or a module whose only child is one"),
        (Owner, "expected an nn.Sequential, or a module whose only child is one"),
        (convolution, "Conv1d: cannot be packed"),
        (Failing, r"fails on random input.*only words"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_encoders_that_are_left(cls: type[nn.Module], experts: list[int], encoder_class: Any, why: str) -> None:
    net = made(cls, experts, encoder_class=encoder_class)
    before = copy.deepcopy(net)
    report = accelerate(net)
    assert not report.replaced
    with pytest.raises(ValueError, match=why):
        from_libmtl(net)
    if encoder_class is not Failing:
        assert why in report.left[0].why
    assert_same_state(net, before)


def test_a_forward_or_a_hook_on_the_instance_of_an_encoder_is_seen() -> None:
    net = made(MMoE, [2])
    net.experts_shared[1].forward = lambda x: x[:, :5]
    with pytest.raises(ValueError, match=r"experts_shared.1: Encoder: its forward was replaced on the instance"):
        from_libmtl(net)
    assert "experts_shared.1: Encoder: its forward was replaced" in why_left(net)
    net = made(MMoE, [2])
    net.experts_shared[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"experts_shared.0: Encoder: has hooks"):
        from_libmtl(net)


def test_encoders_with_dropout_are_known_while_other_threads_draw() -> None:
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            torch.randn(1000)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(5):
            assert accelerate(made(CGC, [1, 1, 1, 1], encoder_class=Normed), strict=True).replaced
    finally:
        done.set()
        thread.join()


def test_calls_and_classes_that_are_left() -> None:
    assert "every call is of one task" in why_left(made(MMoE, [2], multi_input=True))
    assert "img_size: expected one number" in why_left(made(CGC, [1, 1, 1, 1], img_size=[1, WIDTH]))
    assert "is a subclass of MMoE, whose methods may compute" in why_left(made(libmtl.DSelect_k, [2]))
    net = made(CGC, [1, 1, 1, 1])
    net.experts_specific["a"] = nn.ModuleList()
    assert "num_experts: expected shared experts and some of each task, got [1, 1, 0, 1]" in why_left(net)
    net = made(MMoE, [2])
    net.task_name = ["a", "b", "c"]
    assert "task_name: expected the tasks of the gates" in why_left(net)
    for name in ("forward", "get_share_params", "zero_grad_share_params"):
        net = made(MMoE, [2])
        net.__class__ = type("Own", (type(net),), {name: lambda self, *_: None})
        assert "is a subclass of MMoE" in why_left(net)
    net = made(MMoE, [2])
    net.__class__ = type("Own", (type(net),), {"another": lambda self: None})
    assert accelerate(net, strict=True).replaced


def test_input_with_more_axes_is_an_error_that_says_so() -> None:
    net = made(MMoE, [2])
    accelerate(net)
    with pytest.raises(ValueError, match=r"inputs: expected \(B, D\), as img_size=\[7\] says, got \(2, 1, 7\)"):
        net(torch.zeros(2, 1, WIDTH, dtype=torch.float64))


def test_a_cgc_of_ours_goes_into_one_of_libmtl_and_the_other_way_round() -> None:
    ours = ple_fast.CGC(WIDTH, 3, task_experts=[1, 3, 1], shared_experts=2, expert_units=(6, 5)).double()
    target = made(CGC, [2, 1, 3, 1])
    decoders = target.decoders
    assert to_libmtl(ours, target) is target
    x, _ = batch()
    expected = {task: decoders[task](ours(x)[:, t]) for t, task in enumerate(TASKS)}
    for task, y in target(x).items():
        torch.testing.assert_close(y, expected[task])
    assert_same_state(from_libmtl(target), ours)
    mixed = ple_fast.MMoE(WIDTH, 3, experts=3, expert_units=(6, 5)).double()
    other = to_libmtl(mixed, made(MMoE, [3]))
    assert_same_state(from_libmtl(other), mixed)


@EACH
def test_a_checkpoint_of_named_tasks_needs_their_order(cls: type[nn.Module], experts: list[int]) -> None:
    net = made(cls, experts, encoder_class=lambda: nn.Sequential(*layers(6, 5)))
    trunk = from_libmtl(net)
    state = net.state_dict()
    assert_same_state(from_libmtl(state, like=trunk, tasks=TASKS), trunk)
    assert_same_state(from_libmtl(dict(sorted(state.items())), like=trunk, tasks=list(TASKS)), trunk)
    names = [name for name in state if not name.startswith("decoders")]
    assert list(to_libmtl(trunk, tasks=TASKS).state_dict()) == names
    with pytest.raises(ValueError, match="tasks: expected the names of the tasks in the model's order, of c, a, b"):
        from_libmtl(state, like=trunk)
    with pytest.raises(ValueError, match="tasks: expected 3 names"):
        to_libmtl(trunk, tasks=["a"])
    with pytest.raises(ValueError, match=r"tasks: expected names that an .*ModuleDict takes"):
        to_libmtl(trunk, tasks=["a", "b", "a.b"])
    with pytest.raises(ValueError, match="tasks: expected each name once"):
        to_libmtl(trunk, tasks=["a", "b", "a"])
    with pytest.raises(TypeError, match="tasks: expected a sequence of names, got 'cab'"):
        to_libmtl(trunk, tasks="cab")
    with pytest.raises(ValueError, match="tasks: a model has names of its own"):
        from_libmtl(net, tasks=TASKS)
    with pytest.raises(ValueError, match="tasks: a target has names of its own"):
        to_libmtl(trunk, net, tasks=TASKS)


def test_targets_and_trunks_that_do_not_fit() -> None:
    trunk = from_libmtl(made(CGC, [2, 1, 3, 1]))
    for other in (made(CGC, [2, 1, 1, 1]), made(CGC, [2, 1, 3, 1], encoder_class=Normed)):
        with pytest.raises(ValueError, match=r"target: is of another configuration than the trunk:\n  level 0"):
            to_libmtl(trunk, other)
    wide = made(
        CGC, [2, 1, 3, 1], encoder_class=lambda: nn.Sequential(nn.Linear(9, 6), *layers(6, 5)[1:]), img_size=[9]
    )
    before = copy.deepcopy(wide)
    with pytest.raises(ValueError, match=r"experts\[0\].0.weight: \(6, 9\), expected \(6, 7\)"):
        to_libmtl(trunk, wide)
    assert_same_state(wide, before)
    with pytest.raises(TypeError, match="levels like CGC, got MTLmodel"):
        to_libmtl(trunk, made(MMoE, [3]))
    with pytest.raises(TypeError, match="expected a model of LibMTL with levels like CGC or MMoE, got MMoE"):
        from_libmtl(torcheasyrec.MMoE(7, {"hidden_units": [8, 5]}, 3, 2, {"hidden_units": [4]}))


def level(**options: Any) -> ExtractionNetwork:
    given = {"topology": Topology.ple(2, 1, 1, last=True), "experts": MLPSpec((4,)), "gate": GateSpec(), **options}
    return ExtractionNetwork(4, given.pop("topology"), **given)


@pytest.mark.parametrize(
    ("trunk", "why"),
    [
        (PLE(4, 2, expert_units=[(4,), (4,)]), "it has one level, got 2"),
        (PLE.from_levels([level(topology=Topology.ple(2, 1, 0, last=True))]), "with shared experts and some of each"),
        (PLE.from_levels([level(topology=Topology.ple(2, [0, 1], 1, last=True))]), "with shared experts and some of e"),
        (PLE.from_levels([level(gate=GateSpec((3,)))]), "its gates are one linear layer with a bias, and a softmax"),
        (PLE.from_levels([level(gate=GateSpec(top_k=1))]), "its gates are one linear layer with a bias, and a softmax"),
        (PLE.from_levels([level(experts=[MLPSpec((4,))] * 2 + [MLPSpec((3, 4))])]), "all its experts are made alike"),
    ],
)
def test_trunks_that_libmtl_cannot_represent(trunk: PLE, why: str) -> None:
    with pytest.raises(ValueError, match=f"LibMTL cannot represent this trunk: .*{why}"):
        to_libmtl(trunk)


@EACH
def test_compiled_exported_and_traced_as_one_graph(cls: type[nn.Module], experts: list[int]) -> None:
    net = made(cls, experts).float().eval()
    x = batch()[0].float()
    expected = net(x)
    accelerate(net, strict=True)
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    compiled: Any = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    traced: Any = fx.symbolic_trace(net, concrete_args={"task_name": None})
    torch.testing.assert_close(traced(x), expected)
