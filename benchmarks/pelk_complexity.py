"""Parameters and MACs of PeLK, dense and at 40 % zeros, beside the published ones.

Example:
    python benchmarks/pelk_complexity.py

With the classifier, for one picture. At 40 % zeros every 2-D and 4-D weight counts 0.6: a uniform
distribution of the zeros, where the published models have SNIP's. The positional embeddings are
shown apart, since they become biases when the model is deployed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmslak.analysis import complexity
from mmslak.models import PeLK, PeripheralConv2d

SPARSITY = 0.4
B101 = dict(arch='base', kernel_sizes=(101, 69, 67, 13), center=7)
# Name: options, size of the picture, published 10⁶ parameters, published 10⁹ MACs.
PUBLISHED = {
    'T': (dict(arch='tiny'), 224, 29, 5.6),
    'S': (dict(arch='small'), 224, 50, 10.7),
    'B': (dict(arch='base'), 224, 89, 18.3),
    'B-101': (B101, 384, 90, 68.3),
}
OTHER_CHOICES = {  # of T
    'width 1.0': dict(width_factor=1.0),
    'all channels convolved': dict(conv_ratio=1.0),
    'no small kernel': dict(small_kernel=None),
}


@dataclass
class Counts:
    """Parameters and MACs of a classifier.

    Attributes:
        parameters: All of them.
        embeddings: Those of the positional embeddings.
        macs: Every weight of the dense kernels once per output position.
        shared_macs: As `macs`, but every shared weight once.
        sparse_parameters: Without embeddings, at 40 % zeros.
        sparse_macs: At 40 % zeros.
    """

    parameters: int
    embeddings: int
    macs: int
    shared_macs: int
    sparse_parameters: float
    sparse_macs: float


class Classifier(nn.Module):
    """Backbone and linear head for ImageNet-1K."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.backbone = PeLK(out_indices=3, gap_before_final_norm=True, **options)
        self.head = nn.Linear(self.backbone.channels[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[0])


def count(options: dict, size: int) -> Counts:
    """Counts of a PeLK, given its options, on a picture of size × size."""
    with torch.device('meta'):
        model = Classifier(**options)
    model.to_empty(device='cpu')
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().zero_()
    positions = {}  # outputs per channel, by convolution

    def remember(module: PeripheralConv2d, inputs: tuple) -> None:
        positions[module.peripheral] = inputs[0].shape[2] * inputs[0].shape[3]

    for stage in model.backbone.stages:
        for block in stage:
            block.large_kernel.register_forward_pre_hook(remember)
    total = complexity(model, (size, size)).total
    repeated = sum(
        (conv.kernel_size**2 - len(conv.grid) ** 2) * conv.channels * n
        for conv, n in positions.items()
    )
    embeddings = sum(stage.position_embedding.numel() for stage in model.backbone.stages)
    masked = sum(p.numel() for p in model.parameters() if p.dim() in (2, 4))
    return Counts(
        parameters=total.parameters,
        embeddings=embeddings,
        macs=total.macs,
        shared_macs=total.macs - repeated,
        sparse_parameters=total.parameters - embeddings - SPARSITY * masked,
        sparse_macs=(1 - SPARSITY) * total.macs,
    )


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    header = ('', 'dense', 'embeddings', '40 %', 'published', 'off')
    row = '{:24}{:>9}{:>12}{:>9}{:>11}{:>8}'.format
    tiny = PUBLISHED['T']
    rows = {f'PeLK-{name}': entry for name, entry in PUBLISHED.items()}
    rows |= {f'T, {k}': ({**tiny[0], **v}, *tiny[1:]) for k, v in OTHER_CHOICES.items()}
    found = {name: count(options, size) for name, (options, size, *_) in rows.items()}
    print(row('10⁶ parameters', *header[1:]))
    for name, c in found.items():
        published = rows[name][2]
        print(
            row(
                name,
                f'{(c.parameters - c.embeddings) / 1e6:.1f}',
                f'{c.embeddings / 1e6:.1f}',
                f'{c.sparse_parameters / 1e6:.1f}',
                published,
                f'{c.sparse_parameters / 1e6 / published - 1:+.1%}',
            )
        )
    print(row('\n10⁹ MACs', 'dense', 'shared once', '40 %', 'published', 'off'))
    for name, c in found.items():
        published = rows[name][3]
        print(
            row(
                name,
                f'{c.macs / 1e9:.2f}',
                f'{c.shared_macs / 1e9:.2f}',
                f'{c.sparse_macs / 1e9:.2f}',
                published,
                f'{c.sparse_macs / 1e9 / published - 1:+.1%}',
            )
        )


if __name__ == '__main__':
    sys.exit(main())
