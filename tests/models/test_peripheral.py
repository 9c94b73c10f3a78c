import pytest
import torch
import torch.nn.functional as F

from mmslak.models import PeripheralConv2d, sharing_grid
from mmslak.models.peripheral import expand

C = 3


def conv(kernel_size: int, center: int = 5, **options) -> PeripheralConv2d:
    torch.manual_seed(0)
    return PeripheralConv2d(C, kernel_size, center, **options).double()


def embedding(kernel_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (C, kernel_size, kernel_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def maps(height: int, width: int, n: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (n, C, height, width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def windows(x: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """(N, C, K, K, H, W): what lies below the kernel at every position, zeros outside the map."""
    n, c, height, width = x.shape
    unfolded = F.unfold(x, kernel_size, padding=kernel_size // 2)
    return unfolded.view(n, c, kernel_size, kernel_size, height, width)


@pytest.mark.parametrize(
    ('kernel_size', 'center', 'grid'),
    [
        (33, 5, [8, 4, 2, 1, 1, 1, 1, 1, 2, 4, 8]),
        (31, 5, [7, 4, 2, 1, 1, 1, 1, 1, 2, 4, 7]),
        (51, 5, [9, 8, 4, 2, 1, 1, 1, 1, 1, 2, 4, 8, 9]),
        (51, 7, [8, 8, 4, 2, 1, 1, 1, 1, 1, 1, 1, 2, 4, 8, 8]),
        (101, 7, [17, 16, 8, 4, 2, 1, 1, 1, 1, 1, 1, 1, 2, 4, 8, 16, 17]),
        (69, 7, [1, 16, 8, 4, 2, 1, 1, 1, 1, 1, 1, 1, 2, 4, 8, 16, 1]),  # a remainder of 1
        (13, 7, [1, 2, 1, 1, 1, 1, 1, 1, 1, 2, 1]),
        (7, 5, [1] * 7),
        (5, 5, [1] * 5),
        (3, 1, [1] * 3),
    ],
)
def test_grids(kernel_size, center, grid):
    assert sharing_grid(kernel_size, center) == grid


@pytest.mark.parametrize('center', [1, 3, 5, 7])
def test_grids_cover_the_kernel(center):
    for kernel_size in range(center, 130, 2):
        grid = sharing_grid(kernel_size, center)
        assert sum(grid) == kernel_size
        assert grid == grid[::-1]
        middle = (len(grid) - center) // 2
        assert grid[middle : middle + center] == [1] * center


@pytest.mark.parametrize(('kernel_size', 'center'), [(50, 5), (51, 4), (5, 7), (51, -1)])
def test_grids_that_there_are_not(kernel_size, center):
    with pytest.raises(ValueError, match=f'must be odd.*got {kernel_size} and {center}'):
        sharing_grid(kernel_size, center)


@pytest.mark.parametrize(
    ('kernel_size', 'center', 'weights'), [(33, 5, 121), (51, 5, 169), (51, 7, 225), (101, 7, 289)]
)
def test_parameters_are_the_shared_ones(kernel_size, center, weights):
    module = PeripheralConv2d(4, kernel_size, center)
    assert [p.shape.numel() for p in module.parameters()] == [4 * weights]
    assert module.kernel().shape == (4, 1, kernel_size, kernel_size)


def test_expansion_of_a_small_kernel():
    """9×9 with centre 3: intervals of 1, 2, 1, 1, 1, 2, 1."""
    weight = torch.arange(49.0).view(1, 1, 7, 7).requires_grad_()
    dense = expand(weight, sharing_grid(9, 3))
    at = [0, 1, 1, 2, 3, 4, 5, 5, 6]
    expected = [[7.0 * row + column for column in at] for row in at]
    assert dense[0, 0].tolist() == expected
    (gradient,) = torch.autograd.grad(dense.sum(), weight)
    assert gradient[0, 0, 1].tolist() == [2, 4, 2, 2, 2, 4, 2]


@pytest.mark.parametrize('kernel_size', range(13, 102, 2))
def test_equals_the_dense_convolution(kernel_size):
    """Forward and gradients in float64; 101 and most others are larger than the map."""
    module, x = conv(kernel_size, conv_backend='fft'), maps(18, 13)
    at = torch.repeat_interleave(torch.tensor(module.grid))
    dense = module.weight[:, :, at][..., at]
    expected = F.conv2d(x, dense, padding=kernel_size // 2, groups=C)
    got = module(x)
    torch.testing.assert_close(got, expected)
    gradient = torch.randn_like(got)
    inputs = (x, module.weight)
    for a, b in zip(
        torch.autograd.grad(got, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('backend', ['auto', 'native', 'fft'])
@pytest.mark.parametrize(
    ('kernel_size', 'height', 'width'), [(13, 40, 33), (51, 30, 60), (101, 103, 8)]
)
def test_backends_and_maps(backend, kernel_size, height, width):
    module, x = conv(kernel_size, conv_backend=backend), maps(height, width, n=1)
    expected = F.conv2d(x, module.kernel(), padding=kernel_size // 2, groups=C)
    got = module(x)
    torch.testing.assert_close(got, expected)
    inputs, gradient = (x, module.weight), torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('size', [(12, 9), (5, 20), (3, 3)])
@pytest.mark.parametrize('strict', [False, True])
def test_positional_embedding_by_its_definition(size, strict):
    module, x, h = conv(9, 3, strict_borders=strict), maps(*size), embedding(9)
    below = windows(x, 9)
    inside = windows(torch.ones_like(x), 9) if strict else torch.ones_like(below)
    kernel = module.kernel().squeeze(1)
    moved = below + inside * h[:, :, :, None, None]
    expected = torch.einsum('nckjhw,ckj->nchw', moved, kernel)
    got = module(x, h)
    torch.testing.assert_close(got, expected)
    gradient, inputs = torch.randn_like(got), (x, h, module.weight)
    for a, b in zip(
        torch.autograd.grad(got, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_forms_of_the_embedding_differ_at_borders_alone():
    x, h = maps(20, 24), embedding(9)
    folded, strict = (conv(9, strict_borders=s)(x, h) for s in (False, True))
    torch.testing.assert_close(folded[..., 4:-4, 4:-4], strict[..., 4:-4, 4:-4])
    assert (folded - strict)[..., 0, :].abs().min() > 1e-6


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('with_embedding', [False, True])
def test_deployed_form_gives_the_same_outputs(strict, with_embedding):
    module = conv(31, strict_borders=strict).float()
    x, h = maps(20, 40).float(), embedding(31).float() if with_embedding else None
    expected = module(x, h)
    module.switch_to_deploy(h)
    got = module(x)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert module.weight.shape == (C, 1, 31, 31)
    module.switch_to_deploy(h)  # a second call changes nothing
    assert torch.equal(module(x), got)


@pytest.mark.parametrize('strict', [False, True])
def test_autocast(strict):
    module, x, h = conv(31, strict_borders=strict).float(), maps(30, 30).float(), embedding(31)
    with torch.autocast('cpu', torch.bfloat16):
        got = module(x, h.float())
    assert got.dtype == torch.bfloat16
    expected = module(x, h.float())
    assert (got - expected).abs().max() <= 0.03 * expected.abs().max()
