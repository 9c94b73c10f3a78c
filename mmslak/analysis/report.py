"""A sparse model on one HTML page: densities, learnt patterns, churn and Rs over training."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from mmslak.analysis.page import figure, whole_page
from mmslak.analysis.pictures import draw_curve, draw_patterns, draw_units, figure_uri

SMALLEST_PATTERN = 5  # longer side of the kernels that are drawn
CURVES = {
    'sparse/churn': ('Churn', 'share of active weights that an update replaced'),
    'sparse/exploration_rate': ('Rs', 'share of weights that were active at any time'),
}
UNITS = 'sparse/units/'  # of each hidden layer, where whole units go
STYLE = """
table { width: 100%; font-size: 13px }
td, th { padding: 1px 8px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
td:first-child, th:first-child { text-align: left; font-family: monospace }
.bar { background: #e4e4e4; width: 12em } .bar div { background: #3b6ea5; height: 0.9em }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top }
figcaption { font-size: 12px; font-family: monospace }
"""


def read_sparse_log(folder: str | Path) -> list[dict[str, float]]:
    """What SparseTrainingHook logged in a run, from `*/vis_data/scalars.json` of its work folder.

    A run that was resumed, or started anew, goes on from its first step: what earlier parts logged
    from there on is dropped.

    Args:
        folder: The work folder.

    Returns:
        Dicts with `step` and `sparse/…` in the order of the steps; empty if there is none.
    """
    records: list[dict[str, float]] = []
    for file in sorted(Path(folder).glob('*/vis_data/scalars.json')):  # folders are named by time
        part = []
        for line in file.read_text(encoding='utf-8').splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed
                continue
            if isinstance(record, dict) and 'sparse/density' in record and 'step' in record:
                part.append(record)
        if part:
            records = [r for r in records if r['step'] < part[0]['step']] + part
    return records


def pattern_shares(masks: Mapping[str, Tensor]) -> dict[str, dict[str, np.ndarray]]:
    """Share of channels in which each position of a depthwise kernel is active.

    Args:
        masks: Bool tensors by parameter name; those of shape (C, 1, kH, kW) with a side of 5 or
            more are taken.

    Returns:
        {block: {kernel: (kH, kW) in [0, 1]}}; a block is what its kernels' names have in common.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, mask in masks.items():
        if mask.dim() != 4 or mask.shape[1] != 1 or max(mask.shape[2:]) < SMALLEST_PATTERN:
            continue
        path = [p for p in name.split('.') if p not in ('weight', 'conv')]
        block, kernel = '.'.join(path[:-1]), path[-1]
        found.setdefault(block, {})[kernel] = mask[:, 0].float().mean(0).cpu().numpy()
    return found


def sparsity_report(
    title: str,
    masks: Mapping[str, Tensor],
    ever: Mapping[str, Tensor] | None = None,
    log: Sequence[Mapping[str, float]] = (),
    notes: Sequence[str] = (),
) -> str:
    """The page.

    Args:
        title: Its heading.
        masks: Bool tensors by parameter name: where weights are active.
        ever: Likewise: where they were at any time; None if that is not known.
        log: From `read_sparse_log`.
        notes: Sentences below the heading.

    Returns:
        HTML with pictures in data URIs, which loads nothing.

    Raises:
        ValueError: If there is no mask.
    """
    if not masks:
        raise ValueError('no weights to report on')
    body = [f'<h1>{html.escape(title)}</h1>', *(f'<p>{html.escape(note)}</p>' for note in notes)]
    body += ['<h2>Density by layer</h2>', _table(masks, ever)]
    body += ['<h2>Learnt patterns</h2>', *_patterns(masks)]
    body += ['<h2>Over training</h2>', *curves(log)]
    return whole_page(title, body, STYLE)


def _table(masks: Mapping[str, Tensor], ever: Mapping[str, Tensor] | None) -> str:
    rows = [_row('all', list(masks.values()), list(ever.values()) if ever else None)]
    rows += [_row(n, [mask], [ever[n]] if ever else None) for n, mask in masks.items()]
    head = '<tr><th>tensor</th><th>shape</th><th>weights</th><th>non-zero</th><th>density</th>'
    return f'<table>{head}<th></th><th>Rs</th></tr>' + '\n'.join(rows) + '</table>'


def _row(name: str, masks: Sequence[Tensor], ever: Sequence[Tensor] | None) -> str:
    total = sum(mask.numel() for mask in masks)
    active = sum(int(mask.count_nonzero()) for mask in masks)
    density = active / total
    shape = '×'.join(map(str, masks[0].shape)) if len(masks) == 1 else f'{len(masks)} tensors'
    tried = '' if ever is None else f'{sum(int(m.count_nonzero()) for m in ever) / total:.4f}'
    bar = f'<div class="bar"><div style="width: {density:.1%}"></div></div>'
    cells = [shape, f'{total:,}', f'{active:,}', f'{density:.4f}', bar, tried]
    return f'<tr><td>{html.escape(name)}</td>' + ''.join(f'<td>{c}</td>' for c in cells) + '</tr>'


def _patterns(masks: Mapping[str, Tensor]) -> list[str]:
    blocks = pattern_shares(masks)
    if not blocks:
        side = SMALLEST_PATTERN
        return [f'<p>No depthwise kernel with a side of {side} or more is masked.</p>']
    parts = ['<p>Share of channels in which each position is active: black 0, white 1.</p>']
    for block, shares in blocks.items():
        sizes = ', '.join(f'{n} {s.shape[0]}×{s.shape[1]}' for n, s in shares.items())
        parts.append(figure(figure_uri(draw_patterns(shares)), f'{block}: {sizes}'))
    return parts


def curves(log: Sequence[Mapping[str, float]]) -> list[str]:
    """Churn, Rs and hidden units over training, as far as they are in a log, as HTML."""
    parts = []
    for key, (name, meaning) in CURVES.items():
        points = [(r['step'], r[key]) for r in log if math.isfinite(r.get(key, math.nan))]
        if points:
            steps, values = zip(*points)
            curve = draw_curve(steps, values, f'{name}: {meaning}')
            parts.append(figure(figure_uri(curve), f'{name}: {values[-1]:.4f} at the end'))
    records = [record for record in log if any(key.startswith(UNITS) for key in record)]
    if records:
        layers = [key for key in records[0] if key.startswith(UNITS)]
        counts = {key.removeprefix(UNITS): [int(r[key]) for r in records] for key in layers}
        alive, all_units = (sum(row[i] for row in counts.values()) for i in (-1, 0))
        picture = draw_units([int(r['step']) for r in records], counts)
        parts.append(
            figure(figure_uri(picture), f'{alive:,} of {all_units:,} hidden units at the end')
        )
    if not log:
        parts.append('<p>No log of sparse training beside the checkpoint.</p>')
    elif not any('sparse/churn' in record for record in log):
        parts.append('<p>The masks never changed in this run, so there is no churn.</p>')
    return parts
