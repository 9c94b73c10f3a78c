"""Parameters and multiply-accumulates (MACs) of a model, dense and non-zero, per part and in all.

For one picture; the papers' FLOPs are these MACs. Heads that only training uses count parameters
and no MACs. A detector's head counts for the proposals that the model finds on noise.

Examples:
    mmslak complexity configs/slak_t_imagenet.py
    mmslak complexity configs/upernet_slak_t_ade20k.py work_dirs/run/iter_160000.pth \\
        --shape 512 2048 --json
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from torch import Tensor, nn

from mmslak.analysis import Complexity, Cost, complexity
from mmslak.apis.model import build_model, read_model_config, read_once
from mmslak.cli.parser import add_cfg_options, add_config, command_parser, one_line_errors
from mmslak.errors import UserError, reason

SHAPES = dict(mmpretrain=(224, 224), mmseg=(512, 512), mmdet=(800, 1280))


def forward_of(model: nn.Module, shape: tuple[int, int], scope: str) -> Callable[[Tensor], object]:
    """The forward pass of a picture; detectors and some segmentors need its size, too."""
    sizes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), shape)
    if hasattr(model, 'encode_decode'):
        # Heads of mask classification and PointRend do not run on features alone, as mode='tensor'
        # wants it; this is prediction without sliding windows.
        return lambda x: model.encode_decode(x, [sizes])
    if scope != 'mmdet':
        return model
    from mmdet.structures import DetDataSample

    sample = DetDataSample(metainfo=dict(scale_factor=(1.0, 1.0), **sizes))
    return lambda x: model(x, [sample], mode='tensor')


def table(found: Complexity) -> str:
    """Rows of text: the parts and the sum."""
    width = max(map(len, [*found.parts, 'all']))
    header = (
        f'{"part":{width}}  {"parameters":>12}  {"non-zero":>12}  {"GMACs":>8}  {"non-zero":>8}'
    )

    def row(name: str, cost: Cost) -> str:
        return (
            f'{name:{width}}  {cost.parameters:>12,}  {cost.nonzero_parameters:>12,}  '
            f'{cost.macs / 1e9:>8.2f}  {cost.nonzero_macs / 1e9:>8.2f}'
        )

    rows = [row(name or '(others)', cost) for name, cost in found.parts.items()]
    return '\n'.join([header, *rows, row('all', found.total)])


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak complexity`."""
    parser = command_parser('complexity', __doc__)
    add_config(parser)
    parser.add_argument(
        'checkpoint', nargs='?', default='none', help='checkpoint [none: a dense, random model]'
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar=('H', 'W'),
        help='size of the picture, one number for a square [224 for classifiers, 512 for '
        'segmentors, 800 1280 for detectors]',
    )
    parser.add_argument('--json', action='store_true', help='print JSON in place of the table')
    add_cfg_options(parser)
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.shape and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error('--shape: expected H W, or one number, above 0')

    cfg = read_model_config(args.config, args.cfg_options)
    scope = cfg.get('default_scope') or 'mmengine'
    shape = args.shape or SHAPES.get(scope, SHAPES['mmpretrain'])
    shape = (shape[0], shape[-1])
    with read_once(args.checkpoint):
        model = build_model(cfg, args.checkpoint)
    try:
        found = complexity(model, shape, forward_of(model, shape, scope))
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            f'{type(model).__name__} of {args.config} does not run on a picture of '
            f'{shape[0]}×{shape[1]}: {reason(error)}'
        ) from error
    if args.json:
        parts = {name: asdict(cost) for name, cost in found.parts.items()}
        print(json.dumps(dict(shape=shape, parts=parts, total=asdict(found.total)), indent=2))
    else:
        print(f'{args.config} at {shape[0]}×{shape[1]}')
        print(table(found))
