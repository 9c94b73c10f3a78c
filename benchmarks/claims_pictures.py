"""Draws what claims.py has found by kernel size: accuracy, mIoU and receptive field.

Example:
    python benchmarks/claims_pictures.py

It writes docs/images/kernels.svg, which docs/evidence.md shows. Needs matplotlib.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from claims import FORMS, KERNELS
from timing import RESULTS, machine

OUT = Path(__file__).parents[1] / 'docs/images/kernels.svg'
# Panels: title, unit of the axis, and the metrics with the style of their lines.
PANELS = (
    ('single digits', 'accuracy, %', {'accuracy': '-'}),
    ('digit scenes', 'mIoU, %', {'mIoU': '-'}),
    (
        'receptive field: square with a share of it',
        'area, % of the picture',
        {'area 20%': ':', 'area 30%': '-.', 'area 50%': '--', 'area 99%': '-'},
    ),
)
COLOURS = dict(zip(FORMS, ('#0072b2', '#d55e00'), strict=True))


def draw(table: dict[str, dict[str, float]], path: Path) -> None:
    """Draws means over seeds with their standard deviations.

    Args:
        table: By variant 'METRIC mean' and, of several seeds, 'METRIC deviation'.
        path: Of the SVG file.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout='constrained')
    for axis, (title, unit, metrics) in zip(figure.subplots(1, 3), PANELS, strict=True):
        for form in FORMS:
            for metric, style in metrics.items():
                rows = {size: table.get(f'{form} {size}', {}) for size in KERNELS}
                rows = {size: row for size, row in rows.items() if f'{metric} mean' in row}
                share = metric.removeprefix('area ')
                axis.errorbar(
                    list(rows),
                    [row[f'{metric} mean'] for row in rows.values()],
                    [row.get(f'{metric} deviation', 0) for row in rows.values()],
                    color=COLOURS[form],
                    linestyle=style,
                    marker='o',
                    markersize=3,
                    capsize=3,
                    linewidth=1.2,
                    label=form if share == metric else f'{form}, {share}',
                )
        axis.set(title=title, xlabel='kernel size', ylabel=unit, xticks=KERNELS)
        axis.title.set_fontsize(10)
        if len(metrics) == 1:
            axis.legend(fontsize=7)
        else:  # areas: from less than 1 to nearly 100
            axis.set(ylim=(0.3, 120), yscale='log')
            axis.yaxis.set_major_formatter('{x:g}')
            axis.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
    # The same bytes for the same numbers: no date, and fixed names of the parts.
    metadata = {'Date': None, 'Description': description(table)}
    with rc_context({'svg.hashsalt': 'mmslak', 'svg.fonttype': 'none'}):
        figure.savefig(path, format='svg', metadata=metadata)


def description(table: dict[str, dict[str, float]]) -> str:
    """The means that are drawn, in words."""
    return '; '.join(
        f'{metric} of {form} {size}: {row[f"{metric} mean"]:.3f}'
        for form in FORMS
        for size in KERNELS
        if (row := table.get(f'{form} {size}'))
        for *_, metrics in PANELS
        for metric in metrics
        if f'{metric} mean' in row
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--result', type=Path, help='JSON file of claims.py [of this machine]')
    parser.add_argument('--out', type=Path, default=OUT, help='[docs/images/kernels.svg]')
    args = parser.parse_args(argv)
    result = args.result or RESULTS / machine('cpu') / 'claims_cpu.json'
    draw(json.loads(result.read_text())['table'], args.out)
    print(args.out)


if __name__ == '__main__':
    main()
