"""Receptive fields with known answers, and areas computed by hand."""

import pytest
import torch
from torch import nn

from mmslak.analysis import (
    THRESHOLDS,
    contribution_scores,
    effective_receptive_field,
    high_contribution_area,
)
from mmslak.analysis.pictures import draw_receptive_fields
from mmslak.models import SLaK


def ones(kernel_size: int, **options) -> nn.Conv2d:
    conv = nn.Conv2d(3, 4, kernel_size, padding=kernel_size // 2, bias=False, **options)
    nn.init.ones_(conv.weight)
    return conv


def test_a_9x9_convolution_touches_81_pixels():
    matrix, used, skipped = effective_receptive_field(ones(9), [torch.rand(3, 31, 40)])
    assert (used, skipped) == (1, 0)
    assert int((matrix > 0).sum()) == 81
    # Four outputs, three channels, every weight one.
    assert torch.equal(matrix[15 - 4 : 15 + 5, 20 - 4 : 20 + 5], torch.full((9, 9), 12.0).double())


def test_a_stride_moves_the_centre_with_it():
    matrix = effective_receptive_field(ones(3, stride=4), [torch.rand(3, 32, 32)]).matrix
    rows = matrix.sum(1).nonzero().flatten().tolist()
    assert rows == [15, 16, 17]  # output 4 of 8


@pytest.mark.parametrize(
    ('at', 'rows', 'columns'),
    [
        ((15, 20), (11, 20), (16, 25)),  # the centre
        ((10, 30), (6, 15), (26, 35)),
        ((0, 20), (0, 5), (16, 25)),  # at a border, where four rows of nine are padding
        ((30, 39), (26, 31), (35, 40)),
        ((0, 0), (0, 5), (0, 5)),
        ((2, 37), (0, 7), (33, 40)),
    ],
)
def test_a_place_that_is_asked_for(at, rows, columns):
    matrix = effective_receptive_field(ones(9), [torch.rand(3, 31, 40)], at=at).matrix
    wanted = torch.zeros(31, 40, dtype=torch.double)
    wanted[slice(*rows), slice(*columns)] = 12.0
    assert torch.equal(matrix, wanted)


def test_the_output_over_a_pixel_is_taken():
    conv = ones(1, stride=4)  # output i looks at pixel 4i alone, and lies over 4i to 4i + 3
    for pixel, seen in ((0, 0), (3, 0), (4, 4), (16, 16), (19, 16), (31, 28)):
        field = effective_receptive_field(conv, [torch.rand(3, 32, 32)], at=(pixel, 31))
        assert field.matrix.nonzero().tolist() == [[seen, 28]]


@pytest.mark.parametrize('stride', [1, 2, 4, 7, 32])
def test_the_centre_is_the_place_of_the_middle_pixel(stride):
    conv = nn.Conv2d(3, 2, stride, stride)  # as a patch embedding, which may leave a border over
    nn.init.ones_(conv.weight)
    for height, width in ((32, 33), (41, 64), (63, 47), (50, 38)):
        image = [torch.rand(3, height, width)]
        field = effective_receptive_field(conv, image)
        same = effective_receptive_field(conv, image, at=(height // 2, width // 2))
        assert torch.equal(field.matrix, same.matrix)
        assert field.matrix.count_nonzero() == stride**2


def test_a_stage_that_is_asked_for():
    def model(x):
        return x, ones(3)(x), ones(5)(x)

    images = [torch.rand(3, 9, 12)]
    for stage, pixels in ((0, 1), (1, 9), (2, 25), (None, 25)):
        field = effective_receptive_field(model, images, at=(4, 4), stage=stage)
        assert field.matrix.count_nonzero() == pixels
    only = effective_receptive_field(ones(3), images, stage=0)
    assert torch.equal(only.matrix, effective_receptive_field(ones(3), images).matrix)


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        (dict(at=(31, 0)), r'at=\(31, 0\): expected a \(row, column\) of inputs of 31×40'),
        (dict(at=(0, -1)), r'at=\(0, -1\)'),
        (dict(stage=1), 'stage=1: the model gives 1 feature maps, from 0'),
        (dict(stage=-1), 'stage=-1'),
    ],
)
def test_a_place_or_stage_that_is_not_there(options, says):
    with pytest.raises(ValueError, match=says):
        effective_receptive_field(ones(3), [torch.rand(3, 31, 40)], **options)


def test_only_positive_contributions_count():
    conv = ones(3)
    conv.weight.data[:, :, 0] = -0.1
    matrix = effective_receptive_field(conv, [torch.rand(3, 9, 9)]).matrix
    assert int((matrix > 0).sum()) == 6


def test_negative_central_outputs_do_not_count():
    """Of 2x and 3x - 10 at x = 1 the second is negative, though its gradient is not."""

    def model(x):
        return torch.cat([2 * x[:, :1], 3 * x[:, 1:2] - 10], 1)

    matrix = effective_receptive_field(model, [torch.ones(3, 5, 5)]).matrix
    assert matrix[2, 2].item() == 2
    assert matrix.count_nonzero() == 1


def test_the_last_map_counts_and_inputs_are_averaged():
    def model(x):
        return torch.zeros(1), x**2  # gradient 2x at the centre

    images = [torch.full((3, 5, 5), 1.0), torch.full((2, 3, 5, 5), 2.0)]
    field = effective_receptive_field(model, images)
    assert field.used == 2
    assert field.matrix[2, 2].item() == (3 * 2 + 2 * 3 * 4) / 2
    assert field.matrix.count_nonzero() == 1


def test_images_of_nan_are_counted_and_left_out():
    images = [torch.rand(3, 9, 9), torch.full((3, 9, 9), torch.nan), torch.rand(3, 9, 9)]
    field = effective_receptive_field(lambda x: x * x, images)
    assert (field.used, field.skipped) == (2, 1)
    assert field.matrix.isfinite().all()


@pytest.mark.parametrize(
    ('model', 'images', 'says'),
    [
        (lambda x: x * x, [torch.full((3, 4, 4), torch.nan)] * 2, '2 inputs, all with NaN'),
        (lambda x: x * x, [], 'no gradient'),
        (lambda x: x.mean((2, 3)), [torch.rand(3, 4, 4)], r'needs a feature map.*\(1, 3\)'),
        (lambda x: [[x, x]], [torch.rand(3, 4, 4)], 'needs a feature map.*the model gives a list'),
        (lambda x: x * x, [torch.rand(3, 4, 4), torch.rand(3, 5, 5)], 'inputs of one size'),
    ],
)
def test_what_has_no_receptive_field(model, images, says):
    with pytest.raises(ValueError, match=says):
        effective_receptive_field(model, images)


def test_areas_by_hand():
    erf = torch.full((5, 5), 0.5)  # outer ring: 16 × 0.5 = 8
    erf[1:4, 1:4] = 1.0  # inner ring: 8
    erf[2, 2] = 4.0  # of 20 in all
    areas = high_contribution_area(erf, [0.1, 0.2, 0.5, 0.6, 0.99])
    # More than the share is asked for: 4 of 20 are not more than 20 %, 12 of 20 not than 60 %.
    assert [area.side for area in areas] == [1, 3, 3, 5, 5]
    assert [area.ratio for area in areas] == [1 / 25, 9 / 25, 9 / 25, 1, 1]


def test_squares_are_cut_at_the_border():
    erf = torch.ones(4, 8)
    (area,) = high_contribution_area(erf, [0.99])
    assert area.ratio == 1
    (area,) = high_contribution_area(erf, [0.5])  # rows 0 to 3, columns 2 to 6: 20 of 32
    assert area == (5, 4 * 5 / 32)


def test_areas_around_a_place():
    erf = torch.zeros(6, 10)
    erf[0:3, 0:3] = 1.0
    (area,) = high_contribution_area(erf, [0.99], at=(1, 1))
    assert area == (3, 9 / 60)
    (area,) = high_contribution_area(erf, [0.99], at=(0, 0))  # rows and columns 0 to 2 are inside
    assert area == (5, 9 / 60)
    (area,) = high_contribution_area(erf, [0.0], at=(5, 9))  # 7 to the left is the nearest
    assert area == (15, 6 * 8 / 60)
    assert high_contribution_area(erf, at=(3, 5)) == high_contribution_area(erf)
    with pytest.raises(ValueError, match=r'at=\(6, 0\).*6×10'):
        high_contribution_area(erf, at=(6, 0))


@pytest.mark.parametrize('thresholds', [[1.0], [-0.1], [0.5, 20]])
def test_thresholds_are_shares(thresholds):
    with pytest.raises(ValueError, match='thresholds'):
        high_contribution_area(torch.ones(3, 3), thresholds)


def test_nothing_contributes():
    with pytest.raises(ValueError, match='zero everywhere'):
        high_contribution_area(torch.zeros(3, 3))
    assert torch.equal(contribution_scores(torch.zeros(2, 2)), torch.zeros(2, 2))


def test_scores_are_logarithms_over_their_maximum():
    scores = contribution_scores(torch.tensor([[99.0, 9.0], [0.0, 999.0]]))
    assert torch.allclose(scores, torch.tensor([[2 / 3, 1 / 3], [0.0, 1.0]]))


def test_slak_tiny_sees_more_than_convnext_tiny():
    """Random weights and the same layer scale; at every threshold of the protocol."""
    from mmpretrain.models import ConvNeXt

    options = dict(out_indices=(3,), layer_scale_init_value=1.0)
    torch.manual_seed(0)
    slak = SLaK('tiny', **options)
    convnext = ConvNeXt('tiny', gap_before_final_norm=False, **options)
    for module in convnext.modules():  # as both papers initialise
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    ratios = {}
    for backbone in (slak, convnext):
        backbone.eval()
        backbone.requires_grad_(False)
        matrix = effective_receptive_field(backbone, [torch.randn(3, 384, 384)]).matrix
        areas = high_contribution_area(contribution_scores(matrix))
        ratios[backbone] = [area.ratio for area in areas]
    assert len(ratios[slak]) == len(THRESHOLDS)
    for wide, narrow in zip(ratios[slak], ratios[convnext], strict=True):
        assert wide > narrow


def test_figure_of_several(tmp_path):
    import numpy as np
    from PIL import Image

    dot = torch.zeros(21, 21)
    dot[10, 10] = 5
    draw_receptive_fields({'one dot': dot, 'everything': torch.ones(21, 21)}, tmp_path / 'a.png')
    picture = np.asarray(Image.open(tmp_path / 'a.png').convert('RGB')).astype(int)
    purple, yellow = [68, 1, 84], [253, 231, 36]
    for colour in (purple, yellow):  # the ends of the one scale: 0 and 1
        assert (np.abs(picture - colour).sum(-1) < 8).sum() > 5000


def test_double_precision_is_asked_of_the_cpu_alone(monkeypatch):
    """Apple's GPUs have none."""
    here, cpu, double = [], torch.Tensor.cpu, torch.Tensor.double

    def to_cpu(tensor):
        here.append(cpu(tensor))
        return here[-1]

    def to_double(tensor):
        assert any(tensor is one for one in here)
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, 'cpu', to_cpu)
    monkeypatch.setattr(torch.Tensor, 'double', to_double)
    field = effective_receptive_field(ones(3), [torch.rand(3, 9, 9)])
    high_contribution_area(field.matrix)
    assert len(here) == 2
