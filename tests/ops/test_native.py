from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from mmslak.ops import native
from mmslak.ops.layouts import layout_of

NCHW, NHWC = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    ('layout', 'size', 'used_size', 'used_layout'),
    [
        (NCHW, (51, 5), (51, 5), NCHW),
        (NCHW, (5, 13), (5, 13), NCHW),
        (NCHW, (5, 15), (15, 5), NCHW),
        (NCHW, (5, 51), (51, 5), NCHW),
        (NCHW, (13, 17), (17, 13), NCHW),
        (NCHW, (51, 51), (51, 51), NHWC),
        (NHWC, (5, 51), (5, 51), NHWC),
        (NHWC, (51, 51), (51, 51), NHWC),
        (NHWC, (5, 9), (5, 9), NHWC),
        (NHWC, (5, 11), (11, 5), NHWC),
        (NHWC, (5, 13), (13, 5), NHWC),
        (NHWC, (13, 13), (13, 13), NCHW),
    ],
)
def test_slow_kernels_of_onednn_are_avoided(layout, size, used_size, used_layout):
    """Which convolution is called, forward and for the gradient of x, and in what layout."""
    x = torch.randn(2, 3, 26, 27).contiguous(memory_format=layout)
    weight = torch.randn(3, 1, *size)
    with mock.patch.object(F, 'conv2d', side_effect=F.conv2d) as conv2d:
        native.forward(x, [weight])
        native.backward(x, [weight], [x], weight_gradients=False)
    assert conv2d.call_count == 2
    for call in conv2d.call_args_list:
        given, kernel = call.args[:2]
        assert tuple(kernel.shape[2:]) == used_size
        assert given.is_contiguous(memory_format=used_layout)


def test_kernel_elements_that_only_meet_padding_are_left_out():
    x, weight = torch.randn(2, 3, 4, 9), torch.randn(3, 1, 11, 13)
    expected = F.conv2d(x, weight, padding=(5, 6), groups=3)
    with mock.patch.object(F, 'conv2d', side_effect=F.conv2d) as conv2d:
        torch.testing.assert_close(native.forward(x, [weight]), [expected])
    assert conv2d.call_args.args[1].shape == (3, 1, 7, 13)
    _, (dw,) = native.backward(x, [weight], [torch.ones_like(x)])
    assert dw.shape == weight.shape
    assert dw.nonzero()[:, 2].unique().tolist() == list(range(2, 9))


def test_the_part_of_a_kernel_that_meets_pixels():
    weight = torch.arange(2.0 * 7 * 5).view(2, 1, 7, 5)
    inner = native.crop_to_map(weight, (1, 2, 2, 9))
    assert torch.equal(inner, weight[:, :, 2:5])
    inner.zero_()  # a view
    assert not weight[:, :, 2:5].any()
    assert native.crop_to_map(weight, (1, 2, 4, 3)).shape == (2, 1, 7, 5)
    assert native.crop_to_map(weight, (1, 2, 1, 1)).shape == (2, 1, 1, 1)


def test_kernels_that_fit_are_merged():
    small = torch.ones(1, 1, 1, 3)
    upright, wide = torch.zeros(1, 1, 5, 1), torch.zeros(1, 1, 3, 5)
    first, second = native.merge_kernels([small, upright, wide])
    assert first.tolist() == [[[[0] * 5, [0, 1, 1, 1, 0], [0] * 5]]]
    assert torch.equal(second, upright)


@pytest.mark.parametrize('way', ['conv', 'other', 'turned'])
def test_kernels_of_a_model_in_channels_last_do_not_turn_the_map(way, monkeypatch):
    """torch would copy a map in NCHW to NHWC, because of the strides of a dimension of size 1."""
    seen, convolve, backward = [], F.conv2d, torch.ops.aten.convolution_backward

    def conv2d(x, weight, *args, **kwargs):
        output = convolve(x, weight, *args, **kwargs)
        seen.append((layout_of(x), layout_of(output)))
        return output

    def convolution_backward(gradient, x, weight, *args):
        dx, dw, db = backward(gradient, x, weight, *args)
        seen.append((layout_of(x), layout_of(dx)))
        return dx, dw, db

    monkeypatch.setattr(F, 'conv2d', conv2d)
    monkeypatch.setattr(torch.ops.aten, 'convolution_backward', convolution_backward)
    weight = torch.randn(3, 1, 5, 7).to(memory_format=torch.channels_last)
    assert weight.stride()[1] == 1
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 8, 9).contiguous(memory_format=layout)
        native.convolve(x, weight, way=way)
        native._torch_backward(x, x, weight, [True, True, False], way)
    assert len(seen) == 4
    for before, after in seen:
        assert before == after
