"""Peripheral convolution: huge kernels with few weights, fine in the centre and coarse outside.

PeLK: Parameter-efficient Large Kernel ConvNets with Peripheral Convolution (CVPR 2024, arXiv
2403.07589). There is no official code: docs/pelk.md lists what is inferred.
"""

import torch
from torch import Tensor, nn

from mmslak.models.hooks import make_permanent
from mmslak.ops import depthwise_conv2d


def sharing_grid(kernel_size: int, center: int = 5) -> list[int]:
    """Widths of the intervals of a kernel's rows (and columns) that share a weight.

    1 in the centre, then 2, 4, 8, … outwards; the outermost ones are what remains, if only 1.

    Args:
        kernel_size: K, odd.
        center: Rows in the middle that share nothing, odd, at most K.

    Returns:
        Widths from left to right, with sum K: 33 gives [8, 4, 2, 1, 1, 1, 1, 1, 2, 4, 8].

    Raises:
        ValueError: If a size is even, or the centre larger than the kernel.
    """
    if kernel_size % 2 == 0 or center % 2 == 0 or not 1 <= center <= kernel_size:
        raise ValueError(
            'kernel_size and center must be odd and center not larger, '
            f'got {kernel_size} and {center}'
        )
    side: list[int] = []
    rest, width = (kernel_size - center) // 2, 2
    while rest > 0:
        side.append(min(width, rest))
        rest, width = rest - side[-1], 2 * width
    return [*reversed(side), *[1] * center, *side]


def expand(weight: Tensor, grid: list[int]) -> Tensor:
    """Dense kernels (C, 1, K, K) of the shared weights (C, 1, k', k'); gradients are summed.

    A weight (a, b) fills the rectangle of the a-th row and the b-th column interval.
    """
    for dim in (2, 3):
        sizes = [[width if d == dim else -1 for d in range(4)] for width in grid]
        slices = weight.split(1, dim)
        weight = torch.cat([s.expand(size) for s, size in zip(slices, sizes, strict=True)], dim)
    return weight


class PeripheralConv2d(nn.Module):
    """Depthwise K×K convolution whose k'×k' weights are shared over a grid, with 'same' padding.

    `forward` takes x of (N, C, H, W) and optionally a positional embedding h of (C, K, K), shared
    by the kernels of a stage, and gives (N, C, H, W):

        Y(y, x) = Σ w(i, j)·(X(y + i, x + j) + h(i, j))        (kernel-wise positional embedding)

    - Folded (the default, inferred): h counts everywhere, also where X is padding. Then Σ w·h is a
      constant of the channel, which deployment folds into a bias.
    - Strict (`strict_borders=True`): h counts where X has a pixel, so that outputs nearer to the
      border than K // 2 differ. Deployment keeps w·h beside the kernel, K² more weights a channel.

    Args:
        channels: Channels of input and output.
        kernel_size: K, odd.
        center: Rows and columns in the middle that share nothing, odd.
        strict_borders: The strict form of the positional embedding.
        conv_backend: Backend of `mmslak.ops.depthwise_conv2d`.

    Raises:
        ValueError: See `sharing_grid`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        center: int = 5,
        strict_borders: bool = False,
        conv_backend: str = 'auto',
    ) -> None:
        super().__init__()
        self.grid = sharing_grid(kernel_size, center)
        self.channels, self.kernel_size = channels, kernel_size
        self.strict_borders, self.conv_backend = strict_borders, conv_backend
        self.deployed = False
        self.weight = nn.Parameter(torch.empty(channels, 1, len(self.grid), len(self.grid)))
        self.register_parameter('bias', None)  # what deployment folds
        self.register_parameter('position', None)  # w·h, (C, K, K), of a deployed strict form
        nn.init.trunc_normal_(self.weight, std=0.02)

    def extra_repr(self) -> str:
        form = 'dense' if self.deployed else f'grid={self.grid}'
        return f'{self.channels}, kernel_size={self.kernel_size}, {form}'

    def kernel(self) -> Tensor:
        """The dense kernels (C, 1, K, K), differentiable."""
        return self.weight if self.deployed else expand(self.weight, self.grid)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(N, C, H, W) to (N, C, H, W); a deployed form has its embedding in it."""
        kernel = self.kernel()
        y = depthwise_conv2d(x, kernel, self.bias, self.conv_backend)
        position = self.position if embedding is None else kernel.squeeze(1) * embedding
        return (
            y if position is None else y + self.positional_term(position, x.shape[2:]).to(y.dtype)
        )

    def positional_term(self, position: Tensor, size: tuple[int, int]) -> Tensor:
        """What the embedding adds to maps of a size: Σ w·h, over the window that lies in the map
        if strict.

        Args:
            position: w·h, (C, K, K).
            size: Height and width of the map.

        Returns:
            (C, 1, 1), or (C, H, W) if strict.
        """
        if not self.strict_borders:
            return position.sum((1, 2), keepdim=True)
        rows, columns = (_inside(length, self.kernel_size, position) for length in size)
        return rows @ position @ columns.T

    @torch.no_grad()
    def switch_to_deploy(self, embedding: Tensor | None = None) -> None:
        """Writes the dense kernel out, and the embedding as a bias (or as w·h if strict)."""
        if self.deployed:
            return
        make_permanent(self)
        kernel = self.kernel().clone()
        if embedding is not None:
            position = kernel.squeeze(1) * embedding
            if self.strict_borders:
                self.position = self._parameter(position)
            else:
                self.bias = self._parameter(position.sum((1, 2)))
        self.weight = self._parameter(kernel)
        self.deployed = True

    def _parameter(self, value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(self.weight), requires_grad=self.weight.requires_grad)


def _inside(length: int, kernel_size: int, like: Tensor) -> Tensor:
    """(length, K) of 0 and 1: whether a kernel's row, centred on that row of a map, lies in it."""
    rows = torch.arange(length, device=like.device)[:, None]
    offsets = torch.arange(kernel_size, device=like.device)[None] - kernel_size // 2
    return ((rows + offsets >= 0) & (rows + offsets < length)).to(like.dtype)
