import pytest
import torch
import torch.nn.functional as F

from mmslak.ops import BACKENDS, DepthwiseConv2d, depthwise_conv2d, depthwise_conv2d_branches

BACKENDS = tuple(b for b in BACKENDS if b != 'triton')  # tests of their own: test_triton.py
SHAPES = [(1, 31), (31, 1), (5, 51), (51, 5), (61, 5), (3, 3), (13, 7), (1, 1), (31, 31)]
SHAPES += [(5, 13), (13, 13)]  # in NHWC oneDNN is slow for 11 to 14 columns


def inputs(size, n=2, channels=3, map_size=(16, 20), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, channels, *map_size, generator=generator, dtype=dtype)
    weight = torch.randn(channels, 1, *size, generator=generator, dtype=dtype)
    bias = torch.randn(channels, generator=generator, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, weight, bias)]


def reference(x, weight, bias=None):
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('size', SHAPES)
@pytest.mark.parametrize('layout', ['nchw', 'nhwc', 'part of nhwc', 'strided'])
def test_equals_the_convolution(backend, size, layout):
    x, weight, bias = inputs(size)
    view = x
    if layout == 'nhwc':
        view = x.contiguous(memory_format=torch.channels_last)
    elif layout == 'part of nhwc':  # as blocks have that convolve some of their channels
        view = torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :3]
    elif layout == 'strided':
        view = x.transpose(2, 3)
    got = depthwise_conv2d(view, weight, bias, backend)
    expected = reference(view, weight, bias)
    torch.testing.assert_close(got, expected)
    assert got.stride() == expected.stride()
    gradient = torch.randn_like(expected)
    got_gradients = torch.autograd.grad(got, (x, weight, bias), gradient)
    for a, b in zip(
        got_gradients, torch.autograd.grad(expected, (x, weight, bias), gradient), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('backend', BACKENDS)
def test_branches_are_the_single_convolutions(backend):
    x = inputs((1, 1))[0]
    weights = [inputs(size)[1] for size in ((51, 5), (5, 51), (5, 5))]
    outputs = depthwise_conv2d_branches(x, weights, backend)
    for output, weight in zip(outputs, weights, strict=True):
        torch.testing.assert_close(output, reference(x, weight))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(backend='cudnn'), "unknown backend 'cudnn': expected one of auto"),
        (dict(x=torch.zeros(3, 8, 8)), r'x: expected \(N, C, H, W\), got shape \(3, 8, 8\)'),
        (
            dict(weight=torch.zeros(4, 1, 5, 5)),
            r'expected \(3, 1, kH, kW\).*got shape \(4, 1, 5, 5\)',
        ),
        (dict(weight=torch.zeros(3, 1, 5, 4)), r'odd kernel sides, got \(5, 4\)'),
        (dict(backend='triton'), "backend 'triton': expected x on a GPU, got the CPU"),
        (dict(bias=torch.zeros(2)), r'bias: expected shape \(3,\), got \(2,\)'),
        (dict(x=torch.zeros(1, 3, 0, 8)), r'expected channels and a map, got .*\(1, 3, 0, 8\)'),
        (dict(x=torch.zeros(1, 3, 8, 8, dtype=torch.cfloat)), 'a floating dtype.*complex64'),
        (dict(x=torch.zeros(1, 3, 8, 8).long()), 'a floating dtype, got torch.int64'),
        (
            dict(weight=torch.zeros(3, 1, 5, 5).double()),
            'weight: expected the dtype of x, torch.float32, got torch.float64',
        ),
        (dict(bias=torch.zeros(3).half()), 'bias: expected the dtype of x.*got torch.float16'),
    ],
)
def test_wrong_arguments(change, message):
    arguments = dict(x=torch.zeros(1, 3, 8, 8), weight=torch.zeros(3, 1, 5, 5))
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(**{**arguments, **change})


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('size', [(51, 5), (5, 51), (31, 31)])
@pytest.mark.parametrize('map_size', [(3, 4), (1, 7), (24, 33)])
@pytest.mark.parametrize('n', [1, 8])
def test_maps_of_any_size(backend, size, map_size, n):
    x, weight, _ = inputs(size, n=n, map_size=map_size)
    got, expected = depthwise_conv2d(x, weight, backend=backend), reference(x, weight)
    torch.testing.assert_close(got, expected)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x, weight), gradient),
        torch.autograd.grad(expected, (x, weight), gradient),
    )


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('size', [(5, 13), (13, 5), (7, 7)])
def test_gradcheck(backend, size):
    x, weight, bias = inputs(size, n=1, channels=2, map_size=(5, 6))
    torch.autograd.gradcheck(lambda *a: depthwise_conv2d(*a, backend), (x, weight, bias))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)]
)
def test_error_against_float64(backend, dtype, tolerance):
    if dtype == torch.float16 and torch.__version__ < '2.3':
        pytest.skip('torch 2.1 has no float16 convolution on the CPU')
    x, weight, _ = inputs((51, 5), map_size=(64, 64))
    x, weight = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    got, expected = depthwise_conv2d(x, weight, backend=backend), reference(*wide)
    assert got.dtype == dtype
    gradient = torch.randn_like(expected).to(dtype)
    pairs = [(got, expected)]
    pairs += zip(
        torch.autograd.grad(got, (x, weight), gradient),
        torch.autograd.grad(expected, wide, gradient.double()),
        strict=True,
    )
    for a, b in pairs:
        error = (a.double() - b).detach().abs().max() / b.detach().abs().max()
        assert float(error) <= tolerance


@pytest.mark.parametrize('backend', BACKENDS)
def test_autocast_casts_as_the_convolution_does(backend):
    x, weight, bias = inputs((13, 5), dtype=torch.float32, map_size=(32, 32))
    with torch.autocast('cpu', torch.bfloat16):
        got = depthwise_conv2d(x, weight, bias, backend)
        assert got.dtype == reference(x, weight, bias).dtype == torch.bfloat16
    gradients = torch.autograd.grad(got.float().sum(), (x, weight, bias))
    assert all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize('backend', BACKENDS)
def test_a_traced_graph_has_plain_convolutions(backend):
    x, weight, _ = inputs((13, 5), dtype=torch.float32)
    x, weight = x.detach(), weight.detach()
    graph = torch.jit.trace(lambda x: depthwise_conv2d(x, weight, backend=backend), x)
    kinds = {node.kind() for node in graph.inlined_graph.nodes()}
    assert kinds & {'aten::_convolution', 'aten::conv2d'}
    assert not {kind for kind in kinds if 'fft' in kind}


def test_only_what_is_wanted_is_computed():
    x, weight, _ = inputs((13, 5), map_size=(32, 32))
    output = depthwise_conv2d(x.detach(), weight)
    output.sum().backward()
    assert weight.grad is not None
    frozen = weight.detach()
    depthwise_conv2d(x, frozen).sum().backward()
    expected = torch.autograd.grad(reference(x, frozen).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('size', [(5, 31), (31, 31)])
def test_an_empty_batch(backend, size):
    x, weight, bias = inputs(size, n=0)
    y = depthwise_conv2d(x, weight, bias, backend)
    assert y.shape == x.shape
    dx, *rest = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert dx.shape == x.shape
    assert all(not gradient.any() for gradient in rest)


@pytest.mark.parametrize('backend', BACKENDS)
def test_functional_transforms(backend):
    x, weight, _ = (tensor.detach() for tensor in inputs((5, 31)))
    tangent = torch.randn_like(x)
    got = torch.func.jvp(lambda x: depthwise_conv2d(x, weight, backend=backend), (x,), (tangent,))
    torch.testing.assert_close(got, (reference(x, weight), reference(tangent, weight)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        y = depthwise_conv2d(dual, weight, backend=backend)
        found = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(found, reference(tangent, weight))

    def loss(x, convolution):
        return (convolution(x, weight) ** 2).sum()

    got = torch.func.grad(loss)(x, lambda *both: depthwise_conv2d(*both, backend=backend))
    torch.testing.assert_close(got, torch.func.grad(loss)(x, reference))
    views = torch.stack([x, tangent])
    got = torch.vmap(lambda x: depthwise_conv2d(x, weight, backend=backend))(views)
    torch.testing.assert_close(got, torch.stack([reference(view, weight) for view in views]))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('backend', BACKENDS)
def test_autocast_leaves_double_precision_alone(backend, dtype):
    x, weight, _ = inputs((5, 31), dtype=dtype)
    with torch.autocast('cpu', torch.bfloat16):
        got = depthwise_conv2d(x, weight, backend=backend)
        assert got.dtype == reference(x, weight).dtype


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('size', [(5, 31), 7])
@pytest.mark.parametrize('has_bias', [True, False])
def test_the_layer_is_a_convolution(backend, size, has_bias):
    x = inputs((1, 1), dtype=torch.float32)[0]
    layer = DepthwiseConv2d(3, size, bias=has_bias, conv_backend=backend)
    stock = torch.nn.Conv2d(3, 3, size, padding='same', groups=3, bias=has_bias)
    stock.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), stock(x), rtol=1e-4, atol=1e-5)
    assert isinstance(layer, torch.nn.Conv2d)


def test_the_layer_says_what_is_wrong():
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        DepthwiseConv2d(3, 5, conv_backend='cudnn')(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match='odd kernel sides'):
        DepthwiseConv2d(3, 4)(torch.zeros(1, 3, 8, 8))
