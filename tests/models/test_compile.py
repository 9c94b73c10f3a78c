"""Backbones under torch.compile: the results of eager mode, in one graph where torch has those."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from mmslak.models import PeLK, SLaK
from mmslak.ops import depthwise_conv2d
from mmslak.ops.native import plain_branches

OPTIONS = dict(
    arch=dict(depths=[1, 1], dims=[8, 8]),
    kernel_sizes=(9, 7),
    width_factor=1.0,
    out_indices=(0, 1),
    layer_scale_init_value=1.0,
)
# Kind, its options, and whether a block makes one graph.
FORMS = {
    'SLaK': (SLaK, {}, True),
    'PeLK': (PeLK, dict(center=3), True),
    'averaged over all batches': (SLaK, dict(norm_cfg=dict(type='BN', momentum=None)), False),
    'instances': (SLaK, dict(norm_cfg=dict(type='IN', track_running_stats=True)), True),
}
whole_graphs = hasattr(torch.library, 'custom_op')  # torch 2.1 has not
IN_OWN_PROCESS = 'MMSLAK_TESTS_COMPILE'
compiles = pytest.mark.skipif(
    not whole_graphs and IN_OWN_PROCESS not in os.environ,
    reason='torch 2.1 takes the step hooks from every optimizer once anything is compiled',
)


@pytest.mark.skipif(
    whole_graphs or IN_OWN_PROCESS in os.environ, reason='only torch 2.1 needs it, and once'
)
def test_all_of_these_in_a_process_of_its_own():
    command = [sys.executable, '-m', 'pytest', '-q', __file__]
    environment = {**os.environ, IN_OWN_PROCESS: '1'}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]


def two_steps(model: nn.Module, function) -> list[torch.Tensor]:
    """Outputs, gradients and running statistics after two batches, in double precision."""
    found = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64, requires_grad=True)
        model.zero_grad()
        outputs = function(x)
        sum(o.square().sum() for o in outputs).backward()
        found += [*outputs, x.grad, *(p.grad for p in model.parameters())]
    return [t.detach().clone() for t in (*found, *model.buffers())]


@compiles
@pytest.mark.parametrize(
    ('form', 'compiler'), [*((form, 'aot_eager') for form in FORMS), ('SLaK', 'inductor')]
)
def test_recomputed_blocks(form, compiler):
    kind, more, is_whole = FORMS[form]
    torch.manual_seed(0)
    model = kind(**OPTIONS, **more, with_cp=True).double()
    expected = two_steps(*[copy.deepcopy(model)] * 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=compiler, fullgraph=whole_graphs and is_whole)
    got = two_steps(model, compiled)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@compiles
@pytest.mark.parametrize('change', ['pruned', 'watched', 'replaced', 'parametrized'])
def test_recomputed_blocks_that_users_have_changed(change):
    """Graphs may end anywhere in them: statistics count a batch once all the same."""
    torch.manual_seed(0)
    model = SLaK(**OPTIONS, with_cp=True).double()
    branch = model.stages[1][0].large_kernel.small
    if change == 'pruned':
        prune.l1_unstructured(branch.conv, 'weight', 0.5)
    elif change == 'watched':
        branch.conv.register_forward_hook(lambda module, args, y: print(end=''))
    elif change == 'replaced':
        branch.conv = Printing(branch.conv)
    else:
        parametrizations.weight_norm(branch.conv)
    expected, compiled = [], torch.compile(model, backend='aot_eager')
    for function in (model, compiled):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        got = two_steps(model, function)
        expected = expected or got
        model.load_state_dict(state)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


class Printing(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x):
        print(end='')
        return self.conv(x)


@compiles
def test_a_dropped_block_is_dropped_in_the_recomputation():
    torch.manual_seed(0)
    block = SLaK(**OPTIONS, with_cp=True, drop_path_rate=0.5).stages[1][0]
    torch._dynamo.reset()
    compiled = torch.compile(block, backend='aot_eager', fullgraph=whole_graphs)
    seen = set()
    for _ in range(16):
        x = torch.randn(1, 8, 8, 8)
        block.zero_grad()
        y = compiled(x)
        y.square().sum().backward()
        dropped = torch.equal(y, x)
        assert bool(block.gamma.grad.any()) != dropped
        seen.add(dropped)
    assert seen == {True, False}


@compiles
@pytest.mark.parametrize('summed', [False, True])
def test_plain_convolutions_are_one_graph(summed):
    x, bias = torch.randn(1, 2, 9, 9), torch.randn(2)
    weights = [torch.randn(2, 1, *size) for size in ((5, 3), (3, 5), (3, 3))]
    arguments = (x, weights, bias if summed else None, summed)
    torch._dynamo.reset()
    compiled = torch.compile(plain_branches, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), plain_branches(*arguments))


@compiles
def test_maps_of_changing_size():
    """torch makes symbols of their sides."""
    weight = torch.randn(3, 1, 13, 3, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: depthwise_conv2d(x, weight), backend='aot_eager')
    for side in (9, 12, 17):
        x = torch.randn(2, 3, side, side + 2, dtype=torch.float64)
        expected = nn.functional.conv2d(x, weight, padding=(6, 1), groups=3)
        torch.testing.assert_close(compiled(x), expected)
