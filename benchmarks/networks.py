"""Networks of others before and after `mmslak.ops.accelerate`, as ratios of medians of one run.

Examples:
    python benchmarks/networks.py --out     # benchmarks/results/MACHINE/networks_cpu.json
    python benchmarks/networks.py --networks RepLKNet-31B --forward 1 224

The model and its accelerated copy have the same weights, the same input and the same layout, and
are timed in turns. Forward is in eval mode without gradients; a training step is forward and
backward in train mode, without the optimizer.
"""

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from backbones import operation
from options import LAYOUTS, facts, new_parser, out_file, parse
from timing import medians, save
from torch import Tensor, nn

import mmslak  # noqa: F401  (CPU-only torchvision)

BN = dict(type='BN')
ALL = (0, 1, 2, 3)


class DilatedBlocks(nn.Sequential):
    """Blocks as UniRepLKNet trains them: a 13×13 kernel beside dilated ones, and an MLP.

    UniRepLKNet: A Universal Perception Large-Kernel ConvNet (CVPR 2024, arXiv 2311.15599).

    Args:
        channels: Of input and output, after a stem of stride 8.
        depth: Number of blocks.
    """

    def __init__(self, channels: int, depth: int) -> None:
        stem = nn.Conv2d(3, channels, 8, stride=8)
        super().__init__(stem, *(DilatedBlock(channels) for _ in range(depth)))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """(N, 3, H, W) to one map (N, channels, H / 8, W / 8)."""
        return (super().forward(x),)


class DilatedBlock(nn.Module):
    """One of `DilatedBlocks`."""

    branches = ((13, 1), (5, 1), (7, 2), (3, 3), (3, 4), (3, 5))  # side, dilation

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        for side, dilation in self.branches:
            padding = side // 2 * dilation
            same = dict(padding=padding, dilation=dilation, groups=channels, bias=False)
            convolution = nn.Conv2d(channels, channels, side, **same)
            self.convolutions.append(nn.Sequential(convolution, nn.BatchNorm2d(channels)))
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1), nn.GELU(), nn.Conv2d(4 * channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        return x + self.mlp(sum(convolution(x) for convolution in self.convolutions))


def _mmpretrain(name: str, **arguments) -> nn.Module:
    from mmpretrain.models import backbones

    return getattr(backbones, name)(out_indices=ALL, **arguments)


def _mscan() -> nn.Module:
    from mmseg.models.backbones import MSCAN

    return MSCAN(embed_dims=[64, 128, 320, 512], depths=[2, 2, 4, 2], norm_cfg=BN)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    'RepLKNet-31B': lambda: _mmpretrain('RepLKNet', arch='31B', norm_cfg=BN),
    'MSCAN-S': _mscan,
    'HorNet-T': lambda: _mmpretrain('HorNet', arch='tiny'),
    'VAN-S': lambda: _mmpretrain('VAN', arch='small'),
    'ConvNeXt-T': lambda: _mmpretrain('ConvNeXt', arch='tiny', gap_before_final_norm=False),
    'UniRepLKNet-like': lambda: DilatedBlocks(192, 4),
}


def measure(build: Callable[[], nn.Module], args: argparse.Namespace) -> tuple[dict, dict]:
    """Ratios of a network by operation and layout, and the medians in milliseconds."""
    from mmslak.ops import accelerate

    before = build()  # of random weights, as torch draws them
    after = copy.deepcopy(before)
    row = {'convolutions': accelerate(after, args.min_size)}
    ratios, milliseconds = {}, {}
    for name, training in dict(forward=False, training=True).items():
        batch, side = args.training if training else args.forward
        for layout in LAYOUTS:
            calls = {
                key: operation(copy.deepcopy(model), (batch, 3, side, side), layout, training, args)
                for key, model in dict(before=before, after=after).items()
            }
            calls['after']()  # measures the choices
            times = medians(calls, args.device, args.rounds, args.budget)
            milliseconds[f'{name}, {layout}'] = times
            ratios[f'{name}, {layout}'] = times['before'] / times['after']
    row |= ratios | {'largest error': difference(before, after, args)}
    return row, milliseconds


@torch.no_grad()
def difference(before: nn.Module, after: nn.Module, args: argparse.Namespace) -> float:
    """Largest difference of an output, as a share of its largest value, in eval mode."""
    images = torch.randn(args.forward[0], 3, args.forward[1], args.forward[1], device=args.device)
    outputs = []
    for model in (before, after):
        model.to(args.device)
        model.eval()  # mmpretrain's eval() returns None: no chaining
        outputs.append(model(images))
    return max(float((a - b).abs().max() / b.abs().max()) for b, a in zip(*outputs, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__, rounds=15, budget=5.0)
    shape = dict(type=int, nargs=2, metavar=('BATCH', 'SIDE'))
    parser.add_argument('--forward', default=(1, 512), help='[1 512]', **shape)
    parser.add_argument('--training', default=(2, 256), help='[2 256]', **shape)
    parser.add_argument('--networks', nargs='+', choices=NETWORKS, default=NETWORKS, help='[all]')
    parser.add_argument('--min-size', type=int, default=7, help='of accelerate [%(default)s]')
    args = parse(parser, argv)
    if args.quick:
        args.forward, args.training, args.rounds = (1, 64), (2, 64), 1
    result = facts(args)
    result |= dict(forward=args.forward, training=args.training, table={}, milliseconds={})
    for name in args.networks:
        row, times = measure(NETWORKS[name], args)
        result['table'][name], result['milliseconds'][name] = row, times
        print(f'{name:18}', ', '.join(f'{title} {value:.3g}' for title, value in row.items()))
        save(result, out_file(args, 'networks'))


if __name__ == '__main__':
    main()
