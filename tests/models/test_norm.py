"""Every norm of feature maps trains, evaluates and, where its statistics are fixed, is fused."""

import pytest
import torch
from mmcv.cnn.utils.fuse_conv_bn import fuse_conv_bn
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmslak.models import PeLK, SLaK
from mmslak.models.norm import fold
from tests.models.test_slak import relative_error

SMALL = dict(
    arch=dict(depths=[1, 2], dims=[8, 12]),
    kernel_sizes=(13, 9),
    out_indices=(0, 1),
    layer_scale_init_value=1.0,
)
FIXED = {
    'as it is': dict(type='BN'),
    'not affine': dict(type='BN', affine=False),
    'averaged over all batches': dict(type='BN', momentum=None),
    'synchronised': dict(type='SyncBN', affine=False, momentum=None),
    'frozen': dict(type='BN', requires_grad=False, eps=1e-3),
}
OTHER = {
    'of the batch': dict(type='BN', track_running_stats=False),
    'of the batch, not affine': dict(type='BN', affine=False, track_running_stats=False),
    'groups': dict(type='GN', num_groups=1),
    'groups, not affine': dict(type='GN', num_groups=1, affine=False),
    'instances': dict(type='IN', affine=True, track_running_stats=True),
}
each_kind = pytest.mark.parametrize('kind', [SLaK, PeLK])


def build(kind, norm_cfg: dict | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    return kind(**SMALL, norm_cfg=norm_cfg, **options)


def trained(kind, norm_cfg: dict) -> nn.Module:
    """After two batches, with affine parameters to fuse."""
    model = build(kind, norm_cfg)
    with torch.no_grad():
        for module in model.modules():
            if 'Norm' in type(module).__name__ and module.weight is not None:
                module.weight.normal_()
                module.bias.normal_()
    for _ in range(2):
        outputs = model(torch.randn(2, 3, 64, 64))
        sum(o.square().sum() for o in outputs).backward()
    assert all(p.grad is not None or not p.requires_grad for p in model.parameters())
    return model.eval()


def one_by_one(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Outputs with every convolution and norm called, as hooks have it."""
    handles = [m.register_forward_hook(lambda *_: None) for m in model.modules()]
    outputs = model(x)
    for handle in handles:
        handle.remove()
    return outputs


@each_kind
@pytest.mark.parametrize('name', [*FIXED, *OTHER])
def test_outputs_in_eval_mode(kind, name):
    model = trained(kind, (FIXED | OTHER)[name])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, got = one_by_one(model, x), model(x)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) <= 1e-5


@each_kind
@pytest.mark.parametrize('name', FIXED)
def test_deployment_of_fixed_norms(kind, name):
    model = trained(kind, FIXED[name])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        model.switch_to_deploy()
        got = model(x)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) <= 1e-5


@each_kind
@pytest.mark.parametrize('name', OTHER)
def test_deployment_of_other_norms_is_an_error(kind, name):
    model = trained(kind, OTHER[name])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(TypeError, match=r'only batch norm can be fused .* running statistics'):
            model.switch_to_deploy()
        for a, b in zip(model(x), expected, strict=True):
            assert torch.equal(a, b)


@each_kind
@pytest.mark.parametrize('name', [*FIXED, *OTHER])
def test_recomputation_counts_a_batch_once(kind, name):
    results = []
    for with_cp in (False, True):
        model = build(kind, (FIXED | OTHER)[name], with_cp=with_cp)
        for seed in (0, 1):
            torch.manual_seed(seed)
            sum(o.square().sum() for o in model(torch.randn(2, 3, 64, 64))).backward()
        results.append([*model.buffers(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_folding(dtype):
    """In float32 at least; the reference is in float64."""
    torch.manual_seed(0)
    kernel, norm = torch.randn(6, 1, 5, 3), nn.BatchNorm2d(6).eval()
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 9)
    kernel, norm = kernel.to(dtype), norm.to(dtype)
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    wide, precise = nn.BatchNorm2d(6).double().eval(), kernel.double()
    wide.load_state_dict(norm.state_dict())
    expected = wide(nn.functional.conv2d(x, precise, groups=6))
    got, bias = fold(kernel, norm)
    assert got.dtype == bias.dtype == (dtype if dtype == torch.float64 else torch.float32)
    output = nn.functional.conv2d(x, got.double(), bias.double(), groups=6)
    assert relative_error(output.detach(), expected.detach()) <= 1e-6


@each_kind
def test_mmcvs_fusing_of_norms(kind):
    """Of tools that fuse by themselves: it leaves a bias in each branch and no norm."""
    model = trained(kind, dict(type='BN'))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        fused = fuse_conv_bn(model)
        assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) < 6
        for a, b in zip(fused(x), expected, strict=True):
            assert relative_error(a, b) <= 1e-5


class NoDouble(TorchDispatchMode):
    """Refuses float64, as Apple's GPUs do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f'{func}: float64 on {value.device}')
        return output


@each_kind
@pytest.mark.parametrize('mode', ['train', 'eval', 'deployed'])
def test_nothing_asks_for_double_precision(kind, mode):
    with torch.device('meta'):
        model, x = build(kind).train(mode == 'train'), torch.empty(2, 3, 64, 64)
    with NoDouble():
        if mode == 'deployed':
            model.switch_to_deploy()
        sum(o.sum() for o in model(x)).backward()


@pytest.mark.skipif(torch.__version__ < '2.4', reason='torch has no autocast for MPS')
@pytest.mark.parametrize('mode', ['eval', 'deployed'])
def test_half_precision_on_apples_gpus(mode):
    """On tensors that say to be there and have no values: no machine with one runs this test."""
    kernel = build(SLaK).eval().stages[0][0].large_kernel
    if mode == 'deployed':
        kernel.switch_to_deploy()
    with FakeTensorMode(), torch.autocast('mps', torch.float16):
        tensors = dict(kernel.named_parameters()) | dict(kernel.named_buffers())
        there = {k: torch.empty(v.shape, dtype=v.dtype, device='mps') for k, v in tensors.items()}
        y = torch.func.functional_call(kernel, there, torch.empty(2, 10, 16, 16, device='mps'))
    assert (y.device.type, y.dtype) == ('mps', torch.float16)
