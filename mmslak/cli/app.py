"""A page on your own pictures: what a model predicts, and what a place that you click looks at.

The page is on this machine alone, and loads nothing from elsewhere. Without a model it shows those
of `make demo`.

Examples:
    mmslak app
    mmslak app mmslak::upernet_slak_t_ade20k iter_160000.pth
    mmslak app configs/upernet_slak_t_ade20k.py work_dirs/upernet_slak_t_ade20k \\
        configs/upernet_convnext_t_ade20k.py convnext.pth --names SLaK ConvNeXt

CHECKPOINT is a file, `none` for random weights, or the work folder of a run: its newest checkpoint
is taken, and the masks of all of them are shown over training.
"""

import argparse
import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmslak.cli.parser import (
    add_cfg_options,
    command_parser,
    model_names,
    model_pairs,
    one_line_errors,
)
from mmslak.errors import UserError

GRADIO = "'gradio>=6.31,<7'"
LOCAL = ('127.0.0.1', 'localhost', '::1')
DEMO = Path('work_dirs/demo')
# Of the demos, in their folder: name, config, folder of the run.
DEMO_MODELS = (
    ('UperNet from a sparse SLaK', 'upernet_slak_digit_scenes', 'upernet_pretrained'),
    ('UperNet from scratch', 'upernet_slak_digit_scenes', 'upernet_from_scratch'),
    ('SLaK on single digits', 'slak_digits', 'slak_digits'),
    ('Faster R-CNN', 'faster_rcnn_slak_digit_scenes', 'faster_rcnn'),
    ('Cascade Mask R-CNN', 'cascade_mask_rcnn_slak_digit_scenes', 'cascade_mask_rcnn'),
)


class Given(NamedTuple):
    """A model that is asked for.

    Attributes:
        name: What the page calls it.
        config: A file or `mmslak::NAME`.
        checkpoint: A file, the work folder of a run, or 'none' for random weights.
    """

    name: str
    config: str
    checkpoint: str


def demo_models() -> list[Given]:
    """The models that the demos have trained here.

    Raises:
        UserError: If there are none.
    """
    found = []
    for name, config, folder in DEMO_MODELS:
        done = DEMO / folder / 'done.json'
        if done.is_file():
            checkpoint = done.parent / Path(json.loads(done.read_text())['checkpoint']).name
            found.append(Given(name, f'mmslak::demo/{config}', str(checkpoint)))
    if not found:
        raise UserError(
            f'no model of the demo in {DEMO}: make demo trains them first (mmslak run-demo without '
            'the clone), or name CONFIG CHECKPOINT'
        )
    return found


def named_models(pairs: Sequence[tuple[str, str]], names: Sequence[str] | None) -> list[Given]:
    """The pairs of a command line, each with a name of its own."""
    found = model_names(pairs, names)
    return [Given(name, *pair) for name, pair in zip(found, pairs, strict=True)]


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak app`."""
    parser = command_parser('app', __doc__)
    parser.add_argument(
        'models', nargs='*', metavar='CONFIG CHECKPOINT', help="one or several [the demo's]"
    )
    parser.add_argument('--names', nargs='+', help='of the models on the page')
    parser.add_argument('--device', help='cpu, cuda, cuda:1 … [a GPU if there is one]')
    parser.add_argument(
        '--host', default=LOCAL[0], help='address to listen at [%(default)s: this machine alone]'
    )
    parser.add_argument('--port', type=int, help='[the first free one from 7860]')
    parser.add_argument(
        '--max-upload', type=int, default=20, metavar='MB', help='size of a picture [%(default)s]'
    )
    add_cfg_options(parser)
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    pairs = model_pairs(parser, args)
    if args.max_upload < 1:
        parser.error('--max-upload: expected a number of megabytes from 1')
    if importlib.util.find_spec('gradio') is None:
        raise UserError(f'the page needs gradio, which is not installed: pip install {GRADIO}')
    given = named_models(pairs, args.names) if pairs else demo_models()

    from mmslak.cli.app_models import load_models
    from mmslak.ops.choice import VARIABLE, tuning

    if VARIABLE not in os.environ:
        tuning('read')  # pictures of any size come, and measuring takes longer than computing
    models = load_models(given, args.device, args.cfg_options)
    if args.host not in LOCAL:
        print(f'Whoever reaches {args.host} can use the page: there is no password.')
    # What gradio reads when it is imported: nothing is sent, and the browser keeps no pictures.
    os.environ.update(GRADIO_ANALYTICS_ENABLED='False', GRADIO_RUN_HISTORY='False')
    with tempfile.TemporaryDirectory(prefix='mmslak_app_') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder  # of what is uploaded and shown
        from mmslak.cli.app_page import serve

        serve(models, args.host, args.port, args.max_upload)
