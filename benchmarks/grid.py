"""The never-slower map: our depthwise layer against nn.Conv2d on kernels and maps of all kinds.

Examples:
    python benchmarks/grid.py --out                 # benchmarks/results/MACHINE/grid_cpu.json
    python benchmarks/grid.py --out --picture grid.png
    python benchmarks/grid.py --out --resume        # goes on where that ended
    python benchmarks/grid.py --compile --out       # both under torch.compile, fewer cases

A case is a kernel, a map, a layout and an operation, with a batch, channels and a dtype drawn at
random. Both layers have the same weights and the same input in the same layout, and are timed in
turns, after a first call in which the operator measures its choice. The ratio is the time of
nn.Conv2d over ours, of which up to 30 µs of call overhead are forgiven. It needs torch alone, and
matplotlib for the picture.
"""

import argparse
import dataclasses
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from options import LAYOUTS, facts, new_parser, out_file, parse
from timing import medians, save
from torch import nn

from mmslak.ops import DepthwiseConv2d

# By the number of their weights.
KERNELS = [
    *((3, 3), (1, 11), (21, 1), (5, 5), (1, 31), (7, 7), (31, 3), (5, 21), (21, 5), (7, 21)),
    *((13, 13), (5, 51), (51, 5), (17, 17), (101, 5), (31, 31), (51, 51), (101, 101)),
]
MAPS = (7, 14, 28, 56, 128, 256)
BATCHES = (1, 2, 4, 8)
CHANNELS = (16, 24, 32, 64, 128)
# In half precision and NHWC, nn.Conv2d with up to 16 channels does not come back where a kernel of
# this width is on a map of 32 or wider: oneDNN's code generation has no end (torch 2.13, AVX512).
ENDLESS = 15
OPERATIONS = ('forward', 'training')
DTYPES = ('float32', 'bfloat16')
NOT_SLOWER = 0.95
FORGIVEN = 0.03  # milliseconds of call overhead
LONGEST = 20.0  # seconds of a call of nn.Conv2d above which a case is left out
SLOW = 1.0  # seconds above which a call is not repeated: nn.Conv2d takes half a minute for 101×101
MOST_VALUES = 1 << 22  # of a map, which bounds memory and time
MOST_PRODUCTS = 2e9  # of a forward pass, unless one picture of 24 channels has more


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison."""

    kernel: tuple[int, int]  # (height, width)
    side: int  # of the map
    batch: int
    channels: int
    layout: str
    dtype: str
    operation: str

    @property
    def name(self) -> str:
        """51×5 on 2×32×56×56 NHWC float32 training."""
        shape = '×'.join(map(str, (self.batch, self.channels, self.side, self.side)))
        how = f'{self.layout} {self.dtype} {self.operation}'
        return f'{spelt(self.kernel)} on {shape} {how}'


def spelt(kernel: tuple[int, int]) -> str:
    """51×5."""
    return f'{kernel[0]}×{kernel[1]}'


def cases(kernels: Sequence[tuple[int, int]] = KERNELS, maps: Sequence[int] = MAPS) -> list[Case]:
    """Every kernel on every map, in both layouts, forward and in training; in random order.

    Neighbours have different dtypes, so that each kernel and each map has both.
    """
    draw, found = random.Random(0), []
    for i, kernel in enumerate(kernels):
        for j, side in enumerate(maps):
            for k, layout in enumerate(LAYOUTS):
                for m, operation in enumerate(OPERATIONS):
                    batch, channels = draw.choice(sizes(kernel, side))
                    dtype = DTYPES[(i + j + k + m) % 2]
                    found.append(Case(kernel, side, batch, channels, layout, dtype, operation))
    draw.shuffle(found)
    return found


def sizes(kernel: tuple[int, int], side: int) -> list[tuple[int, int]]:
    """Batches and channels that do not take too long."""
    found = []
    for batch in BATCHES:
        for channels in CHANNELS:
            values = batch * channels * side**2
            if channels <= 16 and max(kernel) >= ENDLESS:
                continue
            if values <= MOST_VALUES and values * kernel[0] * kernel[1] <= MOST_PRODUCTS:
                found.append((batch, channels))
    return found or [(1, 24)]


def calls(case: Case, device: torch.device, compiled: bool) -> dict[str, Callable]:
    """One call of each layer."""
    memory_format = LAYOUTS[case.layout]
    shape = (case.batch, case.channels, case.side, case.side)
    to = dict(device=device, dtype=getattr(torch, case.dtype))
    x = torch.randn(shape, **to).contiguous(memory_format=memory_format)
    gradient = torch.randn(shape, **to).contiguous(memory_format=memory_format)
    padding = (case.kernel[0] // 2, case.kernel[1] // 2)
    stock = nn.Conv2d(
        case.channels, case.channels, case.kernel, padding=padding, groups=case.channels
    )
    ours = DepthwiseConv2d(case.channels, case.kernel)
    ours.load_state_dict(stock.state_dict())
    x.requires_grad_(case.operation == 'training')
    return {
        name: _call(layer.to(**to).to(memory_format=memory_format), x, gradient, compiled)
        for name, layer in dict(stock=stock, ours=ours).items()
    }


def _call(
    layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor, compiled: bool
) -> Callable[[], object]:
    run = torch.compile(layer) if compiled else layer

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return run(x)

    def training() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(run(x), [x, *layer.parameters()], gradient)

    return training if x.requires_grad else forward


def ratio(stock: float, ours: float) -> float:
    """How many times faster we are; overhead of a call is forgiven up to the time of stock.

    Args:
        stock: Milliseconds of nn.Conv2d.
        ours: Milliseconds of our layer.
    """
    return stock / max(ours - FORGIVEN, min(ours, stock))


def stock_seconds(case: Case, args: argparse.Namespace) -> float:
    """Roughly what a call of nn.Conv2d takes at least, by a map of a quarter of its sides."""
    smaller = dataclasses.replace(case, side=case.side // 4)
    call = calls(smaller, args.device, compiled=False)['stock']
    return 16 * medians({'stock': call}, args.device, 1, 0.1, SLOW)['stock'] / 1e3


def measure(case: Case, args: argparse.Namespace) -> dict | None:
    """Medians and ratio of a case; None if nn.Conv2d takes too long for that."""
    if case.side >= 128 and stock_seconds(case, args) > LONGEST:
        return None
    if args.compile:
        torch._dynamo.reset()
    by_name = calls(case, args.device, args.compile)
    start = time.perf_counter()
    by_name['ours']()  # measures the choice
    first = time.perf_counter() - start
    if args.compile:
        by_name['stock']()
    times = medians(by_name, args.device, args.rounds, args.budget, SLOW)
    return dict(
        name=case.name,
        kernel=list(case.kernel),
        side=case.side,
        layout=case.layout,
        dtype=case.dtype,
        operation=case.operation,
        ratio=ratio(times['stock'], times['ours']),
        stock_ms=times['stock'],
        ours_ms=times['ours'],
        first_call_seconds=first,
    )


def table(results: list[dict], compiled: bool) -> dict[str, dict]:
    """Share not slower and worst ratio, for every operation, layout and dtype and for all."""
    rows = {'all': results}
    for key in ('operation', 'layout', 'dtype'):
        for value in dict.fromkeys(result[key] for result in results):
            rows[value] = [result for result in results if result[key] == value]
    how = 'compiled' if compiled else 'eager'
    return {f'{how}, {name}': summary(rows[name]) for name in ('all', *sorted(set(rows) - {'all'}))}


def summary(results: list[dict]) -> dict[str, int | float | str]:
    """What the map says in numbers."""
    worst = min(results, key=lambda result: result['ratio'])
    return {
        'cases': len(results),
        'not slower': sum(r['ratio'] >= NOT_SLOWER for r in results) / len(results),
        'median': statistics.median(r['ratio'] for r in results),
        'worst': worst['ratio'],
        'worst case': worst['name'],
    }


def draw(results: list[dict], path: str | Path, title: str) -> None:
    """Draws the map: a panel for each operation and layout, kernel × map, colour = ratio."""
    from matplotlib.figure import Figure

    kernels = sorted({tuple(r['kernel']) for r in results}, key=lambda k: (k[0] * k[1], k))
    maps = sorted({result['side'] for result in results})
    panels = [(operation, layout) for operation in OPERATIONS for layout in LAYOUTS]
    figure = Figure(
        figsize=(1.5 + 0.62 * len(maps) * len(panels), 1.8 + 0.3 * len(kernels)),
        layout='constrained',
    )
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (operation, layout) in zip(axes, panels, strict=True):
        grid = [[math.nan] * len(maps) for _ in kernels]
        for result in results:
            if (result['operation'], result['layout']) == (operation, layout):
                times = result['ratio']
                row, column = kernels.index(tuple(result['kernel'])), maps.index(result['side'])
                grid[row][column] = math.log2(times)
                axis.text(
                    column,
                    row,
                    f'{times:.2f}' if times < 9.95 else f'{times:.0f}',
                    ha='center',
                    va='center',
                    fontsize=7,
                    color='white' if abs(math.log2(times)) > 1.4 else 'black',
                    style='italic' if result['dtype'] == 'bfloat16' else 'normal',
                    weight='bold' if times < NOT_SLOWER else 'normal',
                )
        drawn = axis.imshow(grid, cmap='RdBu', vmin=-2, vmax=2, aspect='auto')
        axis.set_title(f'{operation}, {layout}', fontsize=9)
        axis.set_xticks(range(len(maps)), [f'{side}²' for side in maps], fontsize=7)
        axis.set_yticks(range(len(kernels)), map(spelt, kernels), fontsize=7)
    ticks = range(-2, 3)
    bar = figure.colorbar(drawn, ax=axes, ticks=ticks, extend='both', pad=0.01)
    bar.ax.set_yticklabels([f'{2.0**tick:g}' for tick in ticks])
    bar.set_label('times faster than nn.Conv2d', fontsize=8)
    figure.suptitle(f'{title}; italic: bfloat16, bold: slower than {NOT_SLOWER}', fontsize=9)
    figure.savefig(path, dpi=120)


def resumed(path: Path, wanted: dict) -> list[dict]:
    """Cases of a run that has ended early.

    Raises:
        ValueError: If it was under other circumstances.
    """
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    other = [name for name, value in wanted.items() if found.get(name) != value]
    if other:
        raise ValueError(f'{path}: measured with other {", ".join(other)}')
    return found['cases']


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__, rounds=41, budget=0.6, dtypes=())
    parser.add_argument('--compile', action='store_true', help='both layers under torch.compile')
    parser.add_argument('--cases', default='', help='only those whose name has this in it')
    parser.add_argument('--minutes', type=float, default=40, help='no case begins later [40]')
    parser.add_argument('--resume', action='store_true', help='keep the cases of the file of --out')
    parser.add_argument('--picture', metavar='FILE', help='where to draw the map')
    args = parse(parser, argv)
    path = out_file(args, 'grid_compile' if args.compile else 'grid')
    if args.resume and path is None:
        parser.error('--resume needs --out')
    chosen = cases()
    if args.quick:
        chosen, args.rounds = cases([(3, 3), (5, 13)], (7, 14)), 1
    elif args.compile:  # compiling takes seconds
        chosen = cases(KERNELS[::3], MAPS[::2])
    chosen = [case for case in chosen if args.cases in case.name]
    if not chosen:
        parser.error(f'--cases {args.cases}: no case has this in its name')

    result = dict(facts(args), compiled=args.compile)
    try:
        found = resumed(path, result) if args.resume else []
    except ValueError as error:
        parser.error(str(error))
    done, start, left_out = {one['name'] for one in found}, time.monotonic(), []
    for case in chosen:
        if case.name in done:
            continue
        if time.monotonic() - start > 60 * args.minutes:
            print(f'{len(chosen) - len(found)} cases are left: go on with --resume')
            break
        one = measure(case, args)
        if one is None:
            print(f'{case.name:48} nn.Conv2d takes more than {LONGEST:g} s: left out', flush=True)
            left_out.append(case.name)
            continue
        found.append(one)
        times = f'{one["stock_ms"]:9.3f} → {one["ours_ms"]:8.3f} ms'
        state = 'slower' if one['ratio'] < NOT_SLOWER else ''
        print(f'{case.name:48} {times} {one["ratio"]:8.2f} {state}', flush=True)
        result |= dict(cases=found, left_out=left_out, table=table(found, args.compile))
        save(result, path)
    print()
    for name, row in table(found, args.compile).items():
        print(f'{name}: {row["not slower"]:.1%} of {row["cases"]} cases not slower; median '
              f'{row["median"]:.2f}; worst {row["worst"]:.2f}: {row["worst case"]}')  # fmt: skip
    spent = sum(one['first_call_seconds'] for one in found)
    print(f'first calls of our layers, which measure: {spent:.0f} s in all')
    if args.picture:
        title = f'{result["device"]}, {result.get("threads", 1)} threads, torch {result["torch"]}'
        draw(found, args.picture, f'{title}, {"compiled" if args.compile else "eager"}')


if __name__ == '__main__':
    main()
