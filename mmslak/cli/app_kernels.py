"""The kernels of a layer as HTML for `mmslak app`: patterns, fused form, masks over training."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from mmslak.analysis.kernels import LayerKernels
from mmslak.analysis.page import figure, table
from mmslak.analysis.pictures import draw_fused, draw_patterns, figure_uri
from mmslak.analysis.report import curves, read_sparse_log
from mmslak.cli.sparsity import read_masks
from mmslak.errors import UserError

MOST = 6  # checkpoints that are read


def kernels_html(name: str, kernels: LayerKernels) -> str:
    """The parts of a layer's kernel, where their weights are not zero, and what they are fused."""
    rows = [
        (part, '×'.join(map(str, weight.shape[2:])), f'{weight.numel():,}', _density([weight]))
        for part, weight in kernels.weights.items()
    ]
    total = sum(weight.numel() for weight in kernels.weights.values())
    rows.append(('all', '', f'{total:,}', f'{kernels.density:.1%}'))
    side = '×'.join(map(str, kernels.fused.shape[1:]))
    shares = pattern({part: weight != 0 for part, weight in kernels.weights.items()})
    return ''.join(
        [
            f'<h4>{html.escape(name)}</h4>',
            table(('part', 'kernel', 'weights', 'not zero'), rows),
            figure(
                figure_uri(draw_patterns(shares)),
                'Share of channels in which each weight is not zero: black 0, white 1',
            ),
            figure(
                figure_uri(draw_fused(kernels.fused)),
                f'Fused with its norms, {side}: mean magnitude, and the channels of largest norm',
            ),
        ]
    )


def pattern(masks: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Share of channels in which each position is active, by part, of masks (C, 1, kH, kW)."""
    return {part: mask[:, 0].float().mean(0).numpy() for part, mask in masks.items()}


def checkpoints_of(folder: Path) -> list[Path]:
    """Some of the numbered checkpoints of a run, evenly spread, from the first to the last."""
    found = {
        int(match[1]): path
        for path in folder.glob('*.pth')
        if (match := re.fullmatch(r'(?:iter|epoch)_(\d+)\.pth', path.name))
    }
    paths = [found[number] for number in sorted(found)]
    chosen = np.linspace(0, len(paths) - 1, min(MOST, len(paths))).round().astype(int)
    return [paths[index] for index in chosen]


def masks_over_training(folder: Path, layer: str, parts: Sequence[str]) -> str:
    """Where a layer's weights were active in the checkpoints of a run, and its log, as HTML.

    Args:
        folder: The work folder.
        layer: The layer's name.
        parts: Names of its parts.
    """
    found, faults = [], []
    for path in checkpoints_of(folder):
        try:
            masks = read_masks(path)[0]
        except UserError as error:  # damaged ones do not hide the others
            faults.append(f'<p>{html.escape(str(error))}</p>')
            continue
        own = {part: mask for part in parts if (mask := _mask(masks, layer, part)) is not None}
        if own:
            uri = figure_uri(draw_patterns(pattern(own)))
            found.append(figure(uri, f'{path.name}: {_density(list(own.values()))} not zero'))
    found = found or ['<p>No checkpoint has a mask of this layer.</p>']
    return ''.join([*found, *faults, *curves(read_sparse_log(folder))])


def _mask(masks: Mapping[str, Tensor], layer: str, part: str) -> Tensor | None:
    names = (f'{layer}.{part}.conv.weight', f'{layer}.{part}.weight', f'{layer}.weight')
    return next((masks[name] for name in names if name in masks), None)


def _density(tensors: Sequence[Tensor]) -> str:
    active = sum(int(tensor.count_nonzero()) for tensor in tensors)
    return f'{active / sum(tensor.numel() for tensor in tensors):.1%}'
