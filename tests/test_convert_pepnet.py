"""What is particular to TorchEasyRec's PEPNet in a swap; ``test_convert_stand_ins.py`` proves its results."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import fx, nn

from ple_fast import ExtractionNetwork, accelerate, restore
from tests.peers.torcheasyrec import PEPNETS, EPNet, GateNU, PEPNet, PPNet
from tests.swap_proof import ROWS, flat, prove_training, shaken


def made(**options: Any) -> Any:
    torch.manual_seed(0)
    return shaken(PEPNet(4, 1, 2, 3, (6, 5), **options)).double()


@pytest.mark.parametrize("case", PEPNETS[:2], ids=str)
def test_same_loss_curve(case: Any) -> None:
    prove_training(case, torch.float64)


def test_all_tasks_of_a_layer_are_one_level_and_so_are_their_gates() -> None:
    model = made()
    report = accelerate(model, strict=True)
    assert [entry.path for entry in report.replaced] == ["epnet", "ppnet"]
    levels = [module for module in model.ppnet.modules() if isinstance(module, ExtractionNetwork)]
    assert [level.topology.num_experts for level in levels] == [3, 3, 3, 3]
    assert model.epnet.output_dim() == 4
    assert not any(isinstance(module, GateNU) for module in model.modules())
    restore(model)
    assert isinstance(model.ppnet.gate_nus[5], GateNU)


@pytest.mark.parametrize("gamma", [2.0, 0.5])
def test_gamma_goes_with_copies_and_pickles(gamma: float) -> None:
    model = made(gamma=gamma)
    x = torch.randn(ROWS, 7, dtype=torch.float64)
    expected = flat(model(x))
    accelerate(model, strict=True)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for own, theirs in zip(flat(other(x)), expected, strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-12)


def test_outputs_may_be_written_to_and_no_gradient_goes_back_through_the_prior() -> None:
    net: Any = shaken(PPNet(4, 2, 2, (6, 5))).double()
    main, person = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    leaf = main.clone().requires_grad_()
    sum(y.tanh().sum() for y in net(leaf, person)).backward()
    accelerate(net, strict=True)
    own = main.clone().requires_grad_()
    sum(y.tanh_().sum() for y in net(own, person)).backward()
    assert own.grad is not None and leaf.grad is not None
    torch.testing.assert_close(own.grad, leaf.grad)


def test_a_symbolic_trace_has_a_node_for_each_level_and_scale() -> None:
    model = made().eval()
    x = torch.randn(ROWS, 7, dtype=torch.float64)
    accelerate(model, strict=True)
    traced = fx.symbolic_trace(model)
    names = [str(getattr(node.target, "__name__", node.target)) for node in traced.graph.nodes]
    assert names.count("scaled") == 3 and sum("ple_fast" in name for name in names) == 5
    for own, theirs in zip(flat(traced(x)), flat(model(x)), strict=True):
        torch.testing.assert_close(own, theirs)


def test_what_is_not_as_published_is_left_with_its_reason() -> None:
    model = made()
    model.ppnet.gate_nus[1]._gamma = 3.0
    report = accelerate(model)
    assert [entry.path for entry in report.replaced] == ["epnet"]
    assert "one gamma for all gates" in str(report)
    model = made()
    model.epnet.gate_nu.dense_layers[1] = nn.Tanh()
    report = accelerate(model)
    assert [entry.path for entry in report.replaced] == ["ppnet"]
    assert "Linear, ReLU, Linear, Sigmoid, got Linear, Tanh" in str(report)

    class Other(EPNet):
        """A subclass may compute something else."""

    assert not accelerate(nn.ModuleList([Other(3, 2, 4)])).replaced
