import pytest
import torch
import torch.nn.functional as F

from mmslak.ops.layouts import FEW, NCHW, NHWC, PIXELS, in_layout, layout_of, other


@pytest.mark.parametrize(
    ('x', 'layout'),
    [
        (torch.empty(2, 3, 4, 5), NCHW),
        (torch.empty(2, 3, 4, 5).contiguous(memory_format=NHWC), NHWC),
        (torch.empty(2, 6, 4, 5).contiguous(memory_format=NHWC)[:, :3], NHWC),  # slices
        (torch.empty(2, 6, 4, 5).contiguous(memory_format=NHWC)[:, 1:, 1:3, 2:], NHWC),
        (torch.empty(4, 6, 4, 5).contiguous(memory_format=NHWC)[::2, :1], NHWC),
        (torch.empty(2, 6, 1, 1).contiguous(memory_format=NHWC)[:, :3], NCHW),  # of both
        (torch.empty(2, 6, 4, 5)[:, :3], NCHW),
        (torch.empty(2, 6, 4, 5)[:, 3:4], NCHW),
        (torch.empty(2, 6, 4, 5)[:, :, 1:3, 2:], NCHW),
        (torch.empty(2, 6, 4, 5).transpose(2, 3), NCHW),  # neither
        (torch.empty(2, 6, 4, 5).transpose(1, 3), NCHW),
        (torch.empty(1, 6, 1, 1).expand(2, 6, 4, 5), NCHW),
        (torch.empty(2, 1, 4, 5), NCHW),  # in both
        (torch.empty(2, 3, 1, 1).contiguous(memory_format=NHWC), NCHW),  # in both
    ],
)
def test_layout(x, layout):
    assert layout_of(x) == layout
    if x.numel() > x.shape[:2].numel() and x.shape[1] > 1:  # else a map is in both
        y = F.conv2d(x, torch.ones(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])
        assert layout_of(y) == layout


def test_other():
    assert [other(NCHW), other(NHWC)] == [NHWC, NCHW]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(2, 19, 70, 75), (1, 3, 4, 5), (3, 1, 200, 200), (0, 8, 9, 9)])
@pytest.mark.parametrize(('before', 'after'), [(NCHW, NHWC), (NHWC, NCHW)])
def test_in_layout(shape, dtype, before, after):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=before)
    y = in_layout(x, after)
    assert y.is_contiguous(memory_format=after)
    assert y.dtype == dtype
    assert torch.equal(x, y)


@pytest.mark.parametrize('side', [4, 200])
def test_what_has_the_layout_is_not_copied(side):
    x = torch.empty(1, 3, side, side)
    assert in_layout(x, NCHW) is x
    x = x.contiguous(memory_format=NHWC)
    assert in_layout(x, NHWC) is x


@pytest.mark.parametrize(
    'x',
    [
        torch.randn(2, 40, 70, 71).transpose(2, 3),
        torch.randn(2, 40, 70, 71).contiguous(memory_format=NHWC)[:, 3:36],
        torch.randn(2, 40, 70, 71)[:, 3:36],
    ],
    ids=['neither', 'part of NHWC', 'part of NCHW'],
)
def test_what_is_no_whole_map(x):
    assert x[0].numel() > FEW
    assert x[0, 0].numel() > PIXELS
    for layout in (NCHW, NHWC):
        y = in_layout(x, layout)
        assert y.is_contiguous(memory_format=layout)
        assert torch.equal(x, y)
