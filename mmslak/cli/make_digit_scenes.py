"""Writes the digit scenes: a small data set in the formats of ImageNet, ADE20K, VOC 2007 and COCO.

Real handwritten digits on real photographs, from the wheels of scikit-learn and scikit-image:
nothing is downloaded. The same options give the same bytes.
"""

import argparse
from collections.abc import Sequence

from mmslak.cli.parser import command_parser, one_line_errors
from mmslak.datasets import make_digit_scenes
from mmslak.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak make-digit-scenes`."""
    parser = command_parser('make-digit-scenes', __doc__)
    parser.add_argument('--out', default='data/digit_scenes', help='default: %(default)s')
    numbers = dict(
        seed=(0, 'seed of everything but the split into train and test, which is fixed'),
        train=(600, 'training scenes'),
        test=(150, 'test scenes'),
        size=(160, 'average longer side of a scene in pixels; images of single digits have 2/5'),
        train_digits=(3000, 'training images with a single digit'),
        test_digits=(360, 'test images with a single digit'),
    )
    for name, (default, text) in numbers.items():
        parser.add_argument(
            '--' + name.replace('_', '-'),
            type=int,
            default=default,
            metavar='N',
            help=f'{text} (default: {default})',
        )
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        written = make_digit_scenes(**vars(args))
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(f'{args.out}: ' + ('written' if written else 'already there, with the same options'))
    for folder, format_ in (
        ('cls', 'image folders of single digits'),
        ('ade', 'ADE20K'),
        ('voc/VOCdevkit', 'PASCAL VOC 2007'),
        ('coco', 'COCO'),
    ):
        print(f'  {args.out}/{folder:<14} {format_}')
