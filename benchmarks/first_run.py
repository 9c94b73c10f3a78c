"""The price of a first run: what measuring takes for all sizes of a recipe, with an empty cache.

Examples:
    python benchmarks/first_run.py --out      # benchmarks/results/MACHINE/first_run_cpu.json
    python benchmarks/first_run.py --recipes UperNet

The recipes are those of SLaK-T. COCO's pictures are taken to have ratios of sides up to 2, and
batches are padded to the sides of their pictures. Of all sizes whose maps are in the same buckets,
the largest is run once: a training step, or a forward pass where the recipe tests. Stages have two
blocks, and the steps themselves do not count. A run spends 60 s on measuring at most; the printed
command measures beforehand.
"""

import itertools
import os
import tempfile
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from backbones import SLAK_T, TINY, Backbone
from options import facts, new_parser, out_file, parse
from timing import save
from torch import nn

from mmslak.ops import spent
from mmslak.ops.plans import round_size

Size = tuple[int, int]  # height, width
SHORTER = range(480, 801, 32)  # sides of training on COCO; tests have the last one
LONGER = 1333
DIVISOR = 32  # of the sides of a batch
STRIDES = (4, 8, 16, 32)
SHORT_STAGES = dict(arch=dict(depths=[2, 2, 2, 2], dims=[96, 192, 384, 768]), with_cp=True)


class Recipe(NamedTuple):
    """A config, its batch in training, and the sizes of the batches in training and in tests."""

    config: str
    batch: int
    training: list[Size]
    tests: list[Size]


def resized(shorter: Iterable[int], most: float = 2.0) -> set[Size]:
    """Sizes of pictures of any ratio of sides after mmcv's resizing, padded to the divisor."""
    sizes = set()
    for side in shorter:
        sizes |= {(side, longer) for longer in range(side, min(LONGER, int(most * side)) + 1)}
        sizes |= {(less, LONGER) for less in range(int(LONGER / most), side)}  # of long ones
    sizes = {(_padded(height), _padded(width)) for height, width in sizes}
    return sizes | {(width, height) for height, width in sizes}


def _padded(side: int) -> int:
    return -(-side // DIVISOR) * DIVISOR


def batches(sizes: Iterable[Size]) -> set[Size]:
    """Sizes of batches of two or more pictures."""
    pairs = itertools.combinations_with_replacement(set(sizes), 2)
    return {(max(a[0], b[0]), max(a[1], b[1])) for a, b in pairs}


def one_of_each_bucket(sizes: Iterable[Size]) -> list[Size]:
    """The largest of the sizes whose maps are in the same buckets at every stride."""
    found = {}
    for size in sorted(sizes):
        found[tuple(round_size(-(-side // stride)) for stride in STRIDES for side in size)] = size
    return list(found.values())


def recipes() -> dict[str, Recipe]:
    """The recipes by name."""
    crop, coco = [(512, 512)], resized(SHORTER)
    return {
        'UperNet': Recipe(SLAK_T, 4, crop, crop),
        'Cascade Mask R-CNN': Recipe(
            'cascade_mask_rcnn_slak_t_coco.py',
            2,
            one_of_each_bucket(batches(coco)),
            one_of_each_bucket(resized(SHORTER[-1:])),
        ),
    }


def run(model: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """One step for each size, in which the operator meets its cases."""
    for size in recipe.training:
        model.train()
        outputs = model(torch.zeros(recipe.batch, 3, *size, device=device))
        sum(output.sum() for output in outputs).backward()
    model.eval()
    for size in recipe.tests:
        with torch.no_grad():
            model(torch.zeros(1, 3, *size, device=device))


def commands(recipe: Recipe) -> list[str]:
    """What measures the same before a run."""

    def command(batch: int, sizes: list[Size], *options: str) -> str:
        shapes = (f'--shape {batch} 3 {height} {width}' for height, width in sizes)
        return ' '.join([f'mmslak tune mmslak::{recipe.config[:-3]}', *shapes, *options])

    return [command(recipe.batch, recipe.training), command(1, recipe.tests, '--no-train')]


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__, rounds=1, budget=0.0, dtypes=())
    known = recipes()
    parser.add_argument('--recipes', nargs='+', choices=known, default=known, help='[all]')
    args = parse(parser, argv)
    if args.tuning != 'on':
        parser.error(f'--tuning {args.tuning}: nothing would be measured')
    result = facts(args) | dict(table={}, commands={})
    with tempfile.TemporaryDirectory() as cache:
        os.environ['MMSLAK_CACHE'] = cache
        for name in args.recipes:
            recipe = known[name]
            if args.quick:
                recipe = recipe._replace(batch=1, training=[(32, 64)], tests=[(64, 32)])
            model = Backbone(recipe.config, TINY if args.quick else SHORT_STAGES).build()
            cases, seconds = spent()
            run(model.to(args.device), recipe, args.device)
            row = dict(sizes=len(recipe.training) + len(recipe.tests))
            row |= dict(cases=spent()[0] - cases, seconds=spent()[1] - seconds)
            result['table'][name], result['commands'][name] = row, commands(recipe)
            print('{}: {sizes} sizes, {cases} cases, {seconds:.0f} s'.format(name, **row))
            print('  beforehand: ' + ' && '.join(commands(recipe)), flush=True)
            save(result, out_file(args, 'first_run'))


if __name__ == '__main__':
    main()
