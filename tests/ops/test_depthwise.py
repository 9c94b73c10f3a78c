import pytest
import torch
import torch.nn.functional as F

from mmslak.ops import BACKENDS, depthwise_conv2d, depthwise_conv2d_branches

SHAPES = [(1, 31), (31, 1), (5, 51), (51, 5), (61, 5), (3, 3), (13, 7), (1, 1), (31, 31)]


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
@pytest.mark.parametrize('layout', ['nchw', 'nhwc', 'strided'])
def test_equals_the_convolution(backend, size, layout):
    x, weight, bias = inputs(size)
    view = x
    if layout == 'nhwc':
        view = x.contiguous(memory_format=torch.channels_last)
    elif layout == 'strided':
        view = x.transpose(2, 3)
    got = depthwise_conv2d(view, weight, bias, backend)
    expected = reference(view, weight, bias)
    torch.testing.assert_close(got, expected)
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
        (dict(bias=torch.zeros(2)), r'bias: expected shape \(3,\), got \(2,\)'),
    ],
)
def test_wrong_arguments(change, message):
    arguments = dict(x=torch.zeros(1, 3, 8, 8), weight=torch.zeros(3, 1, 5, 5))
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(**{**arguments, **change})
