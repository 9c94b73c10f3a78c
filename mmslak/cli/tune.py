"""Measures, for a model, which methods compute its depthwise convolutions fastest on this machine.

Otherwise they are measured when they come for the first time, up to 60 s in all. One forward pass
in eval mode and one training step without optimizer are run per shape, with random weights.

Examples:
    mmslak tune configs/upernet_slak_t_ade20k.py --shape 16 3 512 512 --amp
    mmslak tune mmslak::cascade_mask_rcnn_slak_t_coco --shape 2 3 800 1344 --shape 2 3 480 1344
    mmslak tune --show
    mmslak tune --export table.json
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mmslak.apis.model import build_model, default_device, read_model_config
from mmslak.cli.parser import add_cfg_options, command_parser, one_line_errors
from mmslak.errors import UserError, reason
from mmslak.ops import tune, tuning

DTYPES = dict(float16=torch.float16, bfloat16=torch.bfloat16)


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak tune`."""
    parser = command_parser('tune', __doc__)
    parser.add_argument('config', nargs='?', metavar='CONFIG', help='config file, or mmslak::NAME')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=4,
        action='append',
        metavar=('N', 'C', 'H', 'W'),
        help='batch of pictures; several for training at several scales',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        choices=list(DTYPES),
        const='float16',
        help='as in training with automatic mixed precision [float16]',
    )
    parser.add_argument('--no-train', action='store_true', help='prediction alone')
    parser.add_argument('--device', help='device to measure on')
    parser.add_argument('--show', action='store_true', help='print all that was measured')
    parser.add_argument(
        '--export',
        type=Path,
        metavar='FILE',
        help='write what was measured on this machine as a table, as mmslak ships them',
    )
    add_cfg_options(parser)
    return parser


def run(model: nn.Module, shape: Sequence[int], amp: torch.dtype | None, train: bool) -> None:
    """Runs the part of a model that makes features, so that its operators meet their cases."""
    backbone = getattr(model, 'backbone', model)
    device = next(model.parameters()).device
    pictures = torch.zeros(shape, device=device)
    with tuning('on', seconds=math.inf), torch.autocast(device.type, amp, enabled=bool(amp)):
        backbone.eval()
        with torch.no_grad():
            backbone(pictures)
        if train:
            backbone.train()
            outputs = backbone(pictures)
            outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
            sum(output.float().sum() for output in outputs).backward()


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.config is None:
        if not args.show and not args.export:
            parser.error('expected a CONFIG with --shape N C H W, --show or --export')
    elif not args.shape or min(min(shape) for shape in args.shape) < 1:
        parser.error('--shape: expected N C H W above 0, the batch that the model trains on')
    else:
        cfg = read_model_config(args.config, args.cfg_options)
        model = build_model(cfg, device=args.device or default_device()).requires_grad_()
        for shape in args.shape:
            try:
                run(model, shape, DTYPES.get(args.amp), not args.no_train)
            except (RuntimeError, ValueError, TypeError) as error:
                size = '×'.join(map(str, shape))
                raise UserError(
                    f'the model of {args.config} does not run on {size}: {reason(error)}'
                ) from error
        print(tune.summary())
    if args.export:
        try:
            print(tune.export(args.export, torch.device(args.device or default_device())))
        except (OSError, ValueError) as error:
            raise UserError(f'--export: {reason(error)}') from error
    if args.show:
        print(tune.show())
