"""Figures of what the analysis found, drawn without a display."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from mmslak.analysis.erf import THRESHOLDS, contribution_scores, high_contribution_area
from mmslak.analysis.page import data_uri

COLOURS = 'inferno'  # of a receptive field over its picture
MOST = 0.9  # opacity of its largest contribution


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


def draw_fused(fused: Tensor, channels: int = 5) -> Figure:
    """Draws dense kernels: their mean magnitude, and the channels of the largest norm.

    Args:
        fused: (C, K, K).
        channels: How many of the channels.

    Returns:
        One row of images. The mean has a scale of its own, the channels one with 0 in the middle.
    """
    chosen = fused.flatten(1).norm(dim=1).argsort(descending=True, stable=True)[:channels].tolist()
    figure = Figure(figsize=(1.7 * (1 + len(chosen)) + 0.6, 2), layout='constrained')
    first, *axes = figure.subplots(1, 1 + len(chosen), squeeze=False)[0]
    drawn = first.imshow(fused.abs().mean(0).numpy(), cmap='viridis', interpolation='nearest')
    first.set_title('mean of |w|', fontsize=7)
    figure.colorbar(drawn, ax=first).ax.tick_params(labelsize=5)
    largest = float(fused[chosen].abs().max()) or 1.0
    for axis, channel in zip(axes, chosen, strict=True):
        scale = dict(vmin=-largest, vmax=largest, cmap='RdBu_r', interpolation='nearest')
        drawn = axis.imshow(fused[channel].numpy(), **scale)
        axis.set_title(f'channel {channel}', fontsize=7)
    figure.colorbar(drawn, ax=axes).ax.tick_params(labelsize=5)
    for axis in (first, *axes):
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def overlay_field(picture: np.ndarray, scores: np.ndarray, at: tuple[int, int]) -> np.ndarray:
    """Draws a receptive field over its picture, which is grey below it, and a cross at its place.

    Args:
        picture: (H, W, 3) uint8, RGB.
        scores: (H, W) in [0, 1]: the colour, from dark to bright. Where it is 0, the picture shows.
        at: (row, column) of the place.

    Returns:
        (H, W, 3) uint8.
    """
    colours = matplotlib.colormaps[COLOURS](scores)[..., :3] * 255
    share = (MOST * scores)[..., None]
    mixed = picture.mean(-1, keepdims=True) * (1 - share) + colours * share
    drawn = Image.fromarray(mixed.round().astype(np.uint8))
    row, column = at
    arm = max(4, max(picture.shape) // 40)
    for line in (
        (column - arm, row, column - 2, row),
        (column + 2, row, column + arm, row),
        (column, row - arm, column, row - 2),
        (column, row + 2, column, row + arm),
    ):
        ImageDraw.Draw(drawn).line(line, fill=(255, 255, 255), width=1 + max(picture.shape) // 500)
    return np.asarray(drawn)


def figure_uri(figure: Figure) -> str:
    """The figure as PNG in a data URI, for pages that need no other file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    return data_uri(buffer.getvalue(), 'png')
