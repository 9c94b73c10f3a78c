"""Figures of what the analysis found, drawn without a display."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from mmslak.analysis.erf import THRESHOLDS, contribution_scores, high_contribution_area
from mmslak.analysis.page import data_uri


def draw_receptive_fields(
    matrices: Mapping[str, Tensor], path: str | Path, thresholds: Sequence[float] = THRESHOLDS
) -> None:
    """Draws receptive fields side by side, in one colour scale, with their area ratios below.

    Args:
        matrices: Averaged contributions (H, W) by the model's name.
        path: Picture to write; the suffix says the format.
        thresholds: Shares of the contributions whose area is given.
    """
    figure = Figure(figsize=(4.2 * len(matrices) + 0.8, 4.9), layout='constrained')
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        scores = contribution_scores(matrix)
        drawn = axis.imshow(scores.numpy(), vmin=0, vmax=1, cmap='viridis')
        areas = high_contribution_area(scores, thresholds)
        ratios = '  '.join(f'{t:.0%}: {a.ratio:.1%}' for t, a in zip(thresholds, areas))
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f'area holding\n{ratios}', fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(drawn, ax=axes, label='contribution, log10(x + 1) / max', shrink=0.8)
    figure.savefig(path, dpi=120)


def draw_patterns(shares: Mapping[str, np.ndarray]) -> Figure:
    """Draws kernels as images: the share of channels in which each position is active.

    Args:
        shares: (kH, kW) in [0, 1] by name.

    Returns:
        One row of images, each in its kernel's proportions, in one grey scale from 0 to 1.
    """
    widths = [max(share.shape[1], 7) for share in shares.values()]
    tallest = max(share.shape[0] for share in shares.values())
    figure = Figure(
        figsize=(0.09 * sum(widths) + 0.5 * len(shares) + 1.2, 0.09 * max(tallest, 18) + 0.7),
        layout='constrained',
    )
    axes = figure.subplots(1, len(shares), squeeze=False, width_ratios=widths)[0]
    for axis, (name, share) in zip(axes, shares.items(), strict=True):
        drawn = axis.imshow(share, vmin=0, vmax=1, cmap='gray', interpolation='nearest')
        axis.set_title(name, fontsize=7)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(drawn, ax=axes, fraction=0.05)
    return figure


def draw_curve(steps: Sequence[int], values: Sequence[float], title: str) -> Figure:
    """Draws one quantity over the iterations of training."""
    figure = Figure(figsize=(5, 2.6), layout='constrained')
    axis = figure.subplots()
    axis.plot(steps, values, marker='.')
    axis.set_title(title, fontsize=10)
    axis.set_xlabel('iteration')
    axis.grid(alpha=0.3)
    return figure


def draw_units(steps: Sequence[int], counts: Mapping[str, Sequence[int]]) -> Figure:
    """Draws how many hidden units of each layer are alive over the iterations of training.

    Args:
        steps: The iterations.
        counts: Units at these iterations by layer.

    Returns:
        One row for each layer; the colour is the share of the most it had.
    """
    shares = [np.asarray(row) / max(1, max(row)) for row in counts.values()]
    figure = Figure(figsize=(7, 1.2 + 0.2 * len(counts)), layout='constrained')
    axis = figure.subplots()
    drawn = axis.imshow(shares, vmin=0, vmax=1, aspect='auto', interpolation='nearest')
    axis.set_yticks(range(len(counts)), [f'{n} ({row[-1]:,})' for n, row in counts.items()])
    shown = sorted({0, len(steps) // 2, len(steps) - 1})
    axis.set_xticks(shown, [str(steps[i]) for i in shown])
    axis.tick_params(labelsize=7)
    axis.set_xlabel('iteration', fontsize=8)
    figure.colorbar(drawn, ax=axis, label='share of hidden units', pad=0.01)
    return figure


def figure_uri(figure: Figure) -> str:
    """The figure as PNG in a data URI, for pages that need no other file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    return data_uri(buffer.getvalue(), 'png')
