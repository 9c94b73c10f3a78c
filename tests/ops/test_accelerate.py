"""`accelerate` on large-kernel networks of the installed libraries, and what it leaves alone."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mmslak.ops import DepthwiseConv2d, accelerate
from tests.golden import ROOT


def depthwise(size, channels=4, padding='same', **options) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, padding=padding, groups=channels, **options)


def picture(size: int = 64, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- which convolutions


class OwnForward(nn.Conv2d):
    """Padding computed from the input, as in timm's Conv2dSame."""

    def forward(self, x):
        return super().forward(x) * 2


def patched() -> nn.Conv2d:
    convolution = depthwise(7)
    convolution.forward = lambda x: x
    return convolution


def parametrized() -> nn.Conv2d:
    return nn.utils.parametrizations.weight_norm(depthwise(7))


@pytest.mark.parametrize(
    'convolution',
    [
        depthwise(7),
        depthwise(7, padding=3),
        depthwise((5, 51), padding=(2, 25)),
        depthwise((1, 7), padding=(0, 3)),
        depthwise(7, bias=False),
        depthwise(7, channels=1),
        depthwise(7).double(),
        depthwise(7, device='meta'),
    ],
    ids=str,
)
def test_changed(convolution):
    assert accelerate(convolution) == 1
    assert type(convolution) is DepthwiseConv2d
    assert accelerate(convolution) == 0


@pytest.mark.parametrize(
    'module',
    [
        depthwise(5),
        depthwise(6),
        depthwise((7, 4)),
        depthwise(7, padding=2),
        depthwise(7, padding='valid'),
        depthwise((7, 9), padding=(4, 3)),
        depthwise(7, padding=3, stride=2),
        depthwise(7, padding=3, stride=(1, 2)),
        depthwise(7, padding=9, dilation=3),
        depthwise(7, dilation=3),
        depthwise(7, padding_mode='reflect'),
        depthwise(7, dtype=torch.complex64),
        nn.Conv2d(4, 4, 7, padding=3),
        nn.Conv2d(4, 4, 7, padding=3, groups=2),
        nn.Conv2d(4, 8, 7, padding=3, groups=4),
        nn.Conv1d(4, 4, 7, padding=3, groups=4),
        nn.ConvTranspose2d(4, 4, 7, padding=3, groups=4),
        nn.LazyConv2d(4, 7, padding=3, groups=4),
        OwnForward(4, 4, 7, padding=3, groups=4),
        DepthwiseConv2d(4, 7),
        patched(),
        parametrized(),
    ],
    ids=str,
)
def test_left_alone(module):
    kind = type(module)
    assert accelerate(nn.Sequential(module)) == 0
    assert type(module) is kind


def test_least_size():
    model = nn.Sequential(*map(depthwise, (3, 7, (3, 31))))
    assert accelerate(model, min_size=9) == 1
    assert [type(module) is DepthwiseConv2d for module in model] == [False, False, True]
    assert accelerate(model, min_size=3) == 2


def test_a_shared_module_counts_once():
    convolution = depthwise(7)
    assert accelerate(nn.Sequential(convolution, nn.ReLU(), convolution)) == 1


def test_dilated_branches_of_unireplknet_stay():
    """One 13×13 kernel beside small dilated ones, each with its norm."""
    sizes = {5: 1, 7: 2, 3: 3}
    model = nn.ModuleList([depthwise(13, padding=6)])
    model += [depthwise(k, padding=r * (k // 2), dilation=r) for k, r in sizes.items()]
    x = torch.randn(1, 4, 32, 32)
    expected = sum(branch(x) for branch in model)
    assert accelerate(model) == 1
    assert [type(branch).__name__ for branch in model] == ['DepthwiseConv2d', *3 * ['Conv2d']]
    torch.testing.assert_close(sum(branch(x) for branch in model), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what stays


def test_the_object_stays():
    model = nn.Sequential(depthwise(7))
    convolution, weight = model[0], model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    convolution.register_forward_hook(lambda *_: calls.append(1))
    accelerate(model)
    assert model[0] is convolution
    assert convolution.weight is weight
    before = weight.detach().clone()
    model(torch.ones(1, 4, 8, 8)).sum().backward()
    optimizer.step()
    assert calls == [1]
    assert not torch.equal(before, weight)


def test_pruning_goes_on():
    model = depthwise(7)
    prune.l1_unstructured(model, 'weight', amount=0.5)
    x = torch.randn(1, 4, 9, 9)
    expected = model(x)
    assert accelerate(model) == 1
    torch.testing.assert_close(model(x), expected)
    assert (model.weight == 0).sum() == 98


@pytest.mark.parametrize('shape', [(4, 9, 8), (0, 4, 9, 8)])
def test_inputs_that_the_convolution_takes(shape):
    model, x = depthwise(7), torch.randn(shape)
    expected = model(x)
    accelerate(model)
    torch.testing.assert_close(model(x), expected)


def test_pickle():
    model = nn.Sequential(depthwise(7))
    accelerate(model)
    again = pickle.loads(pickle.dumps(model))
    assert type(again[0]) is DepthwiseConv2d
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(again(x), model(x))


# ---------------------------------------------------------------- networks


def replknet() -> nn.Module:
    """RepLKNet-31B's kernels in a net of one block a stage."""
    mmpretrain = pytest.importorskip('mmpretrain.models')
    arch = dict(
        large_kernel_sizes=[31, 29, 27, 13],
        layers=[1, 1, 1, 1],
        channels=[4, 8, 8, 8],
        small_kernel=5,
        dw_ratio=1,
    )
    return mmpretrain.RepLKNet(arch, drop_path_rate=0.0, out_indices=(0, 1, 2, 3))


def convnext() -> nn.Module:
    mmpretrain = pytest.importorskip('mmpretrain.models')
    arch = dict(depths=[1, 1, 1, 1], channels=[4, 8, 8, 8])
    return mmpretrain.ConvNeXt(arch, out_indices=(0, 1, 2, 3), layer_scale_init_value=1.0)


def hornet() -> nn.Module:
    mmpretrain = pytest.importorskip('mmpretrain.models')
    arch = dict(base_dim=8, depths=[1, 1, 1, 1], orders=[2, 3, 4, 5])
    arch['dw_cfg'] = [dict(type='DW', kernel_size=7)] * 4
    return mmpretrain.HorNet(arch, scale=1.0, use_layer_scale=False, out_indices=(0, 1, 2, 3))


def van() -> nn.Module:
    """Its large kernel is a 5×5 one and a dilated 7×7 one."""
    mmpretrain = pytest.importorskip('mmpretrain.models')
    arch = dict(embed_dims=[4, 8, 8, 8], depths=[1, 1, 1, 1], ffn_ratios=[2, 2, 2, 2])
    return mmpretrain.VAN(arch, out_indices=(0, 1, 2, 3))


def mscan() -> nn.Module:
    mmseg = pytest.importorskip('mmseg.models')
    return mmseg.MSCAN(
        embed_dims=[4, 8, 8, 8],
        mlp_ratios=[2, 2, 2, 2],
        depths=[1, 1, 1, 1],
        norm_cfg=dict(type='BN'),
    )


# Builder, least size, convolutions of at least that size.
NETWORKS = [
    (replknet, 7, 4),
    (convnext, 7, 4),
    (hornet, 7, 4),
    (van, 7, 0),
    (van, 5, 4),
    (mscan, 7, 24),
]


def pair(build) -> tuple[nn.Module, nn.Module]:
    """Two nets of the same weights, of which the second is to be accelerated; in eval mode."""
    torch.manual_seed(0)
    stock = build()
    stock.eval()
    return stock, copy.deepcopy(stock)


@pytest.mark.parametrize(('build', 'min_size', 'number'), NETWORKS)
def test_outputs_gradients_and_state_stay(build, min_size, number):
    stock, ours = pair(build)
    before = stock.state_dict()
    assert accelerate(ours, min_size) == number
    assert list(ours.state_dict()) == list(before)
    ours.load_state_dict(before)  # of a checkpoint from before
    ours = copy.deepcopy(ours)
    assert sum(type(m) is DepthwiseConv2d for m in ours.modules()) == number
    torch.testing.assert_close(ours(picture()), stock(picture()), rtol=1e-5, atol=1e-5)

    outputs = []
    for net in (stock.double(), ours.double()):  # in training, and to more digits
        net.train()
        outputs.append(net(picture().double()))
        sum(out.square().mean() for out in outputs[-1]).backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_initial_weights_stay():
    """MMEngine selects layers by the name of their class, and initialises after `before_run`."""
    stock, ours = pair(replknet)
    accelerate(ours)
    for net in (stock, ours):
        torch.manual_seed(1)
        net._is_init = False
        net.init_weights()
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_autocast():
    stock, ours = pair(mscan)
    accelerate(ours)
    with torch.autocast('cpu', torch.bfloat16):
        expected, got = stock(picture()), ours(picture())
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0.1, atol=0.1)


def test_compile():
    stock, ours = pair(replknet)
    accelerate(ours)
    compiled = torch.compile(ours, backend='aot_eager')
    torch.testing.assert_close(compiled(picture()), stock(picture()), rtol=1e-4, atol=1e-5)


def test_traced_graph_has_plain_convolutions():
    stock, ours = pair(hornet)
    accelerate(ours)
    graph = torch.jit.trace(ours, picture())
    torch.testing.assert_close(graph(picture()), stock(picture()), rtol=1e-4, atol=1e-5)
    assert not {node.kind() for node in graph.inlined_graph.nodes() if 'mmslak' in node.kind()}


@pytest.mark.skipif(torch.__version__ < '2.6', reason='torch.export is young')
def test_exported_program_has_plain_convolutions():
    stock, ours = pair(convnext)
    accelerate(ours)
    with torch.no_grad():
        program = torch.export.export(ours, (picture(),))
    assert 'mmslak' not in str(program.graph)
    torch.testing.assert_close(program.module()(picture()), stock(picture()), rtol=1e-4, atol=1e-5)


def test_onnx():
    runtime = pytest.importorskip('onnxruntime')
    model = nn.Sequential(nn.Conv2d(3, 4, 1), depthwise((5, 13))).eval()
    accelerate(model)
    file, x = io.BytesIO(), picture(24)
    options = dict(dynamo=False) if 'dynamo' in torch.onnx.export.__annotations__ else {}
    torch.onnx.export(model, (x,), file, **options)
    session = runtime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def _process_group(tmp_path):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures('_process_group')
def test_inside_ddp():
    stock, ours = pair(replknet)
    wrapped = nn.parallel.DistributedDataParallel(ours)
    assert accelerate(wrapped) == 4
    gradients = []
    for net in (stock, wrapped):
        sum(out.square().mean() for out in net(picture())).backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_the_snippet_of_the_docs_runs(capsys):
    pytest.importorskip('mmpretrain.models')
    section = (ROOT / 'docs/operator.md').read_text().partition('## In your network')[2]
    snippet = re.search(r'^```python\n(.*?)^```', section, re.MULTILINE | re.DOTALL)[1]
    exec(snippet, {})
    (shown,) = re.findall(r'# (\d+)$', snippet, re.MULTILINE)
    assert capsys.readouterr().out == f'{shown}\n'
