"""Draws what a config's pipelines yield: pictures after all their transforms, with their labels.

The folder gets a picture per sample, all of them in one contact sheet (sheet.png), and a page
(index.html). What the model's data_preprocessor does to whole batches, such as mixup, is not in the
pictures.

Examples:
    mmslak browse mmslak::upernet_slak_t_ade20k --count 20
    mmslak browse configs/faster_rcnn_slak_t_voc07.py --split val --out work_dirs/val_samples
"""

import argparse
import html
import warnings
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from urllib.parse import quote

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import VISUALIZERS, init_default_scope
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mmslak.analysis.contact_sheet import contact_sheet
from mmslak.analysis.page import figure, whole_page
from mmslak.apis.config import work_dir
from mmslak.apis.inference import TINT, outline
from mmslak.apis.options import read_with_options
from mmslak.cli.config_checks import build_dataset, check_datasets
from mmslak.cli.parser import (
    add_cfg_options,
    add_config,
    check_output,
    command_parser,
    one_line_errors,
)
from mmslak.datasets.findings import quoted
from mmslak.datasets.guard import guard, innermost
from mmslak.datasets.palette import distinct_colours
from mmslak.datasets.samples import BadSampleError
from mmslak.errors import UserError, reason, warn

SPLITS = ('train', 'val')
# Augmentation moves values of 8 bits a little beyond 0 to 255. Values above the first are deeper,
# and negative ones with none above the second were normalised.
DEEP, NORMALISED = 511, 16
LEGEND = 20  # classes up to which the legend has those that are on no picture, too
STYLE = """
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top }
figcaption { font-size: 12px; overflow-wrap: anywhere; max-width: 300px } img { max-width: 300px }
.colour { display: inline-block; width: 1em; height: 1em; margin: 0 0.3em -0.1em 1em }
"""

Cells = list[tuple[str, Path]]
Colours = dict[str, Sequence[int]]


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak browse`."""
    parser = command_parser('browse', __doc__)
    add_config(parser)
    parser.add_argument(
        '--split', choices=[*SPLITS, 'test'], nargs='+', help='[those of train val that there are]'
    )
    parser.add_argument(
        '--count',
        type=int,
        default=20,
        help='samples of each split, spread evenly over the data [%(default)s]',
    )
    parser.add_argument(
        '--out', type=Path, help='folder [browse in the work folder, work_dirs/CONFIG]'
    )
    add_cfg_options(parser, 'data_root=/data/ade')
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f'--count: expected a number from 1, got {args.count}')
    cfg = read_with_options(args.config, args.cfg_options)
    splits = args.split or [s for s in SPLITS if cfg.get(f'{s}_dataloader')] or SPLITS[:1]
    loaders = [f'{split}_dataloader' for split in dict.fromkeys(splits)]
    for loader in loaders:
        if not cfg.get(loader) or not cfg.get('visualizer'):
            raise UserError(f'config {args.config} has no {loader} or no visualizer')
    check_datasets(cfg, loaders)
    args.out = args.out or Path(work_dir(cfg), 'browse')
    check_output(args.out, folder=True)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    parts: dict[str, Cells] = {}
    colours: Colours = {}
    drawn: set[str] = set()
    for loader in loaders:
        folder = args.out / loader.removesuffix('_dataloader')
        parts[loader], own, occurring = draw_samples(cfg, loader, args.count, folder)
        colours.update(own)
        drawn |= occurring
    absent = [name for name in colours if name not in drawn] if drawn else []
    whole = drawn and len(colours) <= LEGEND
    legend = {name: colour for name, colour in colours.items() if whole or name in drawn}
    contact_sheet(parts, legend).save(args.out / 'sheet.png')
    page = to_page(args.config, args.out, parts, legend)
    (args.out / 'index.html').write_text(page, encoding='utf-8')
    print(f'Contact sheet: {args.out / "sheet.png"}')
    print(f'Page: {args.out / "index.html"}')
    if absent:
        print(f'on none of the pictures: {quoted(absent)}; --count draws more of them')


def draw_samples(
    cfg: Config, loader: str, count: int, folder: Path
) -> tuple[Cells, Colours, set[str]]:
    """Writes a picture for each of some samples of a loader.

    A sample that cannot be loaded is left out, and labels that cannot be drawn, too; one warning
    says how many.

    Args:
        cfg: The config.
        loader: Part of it.
        count: Samples, spread evenly over the data.
        folder: Folder of the pictures, which is made.

    Returns:
        Names and files of the pictures, the colours of the classes, and the classes that are drawn.

    Raises:
        UserError: If no sample can be drawn.
    """
    dataset = build_dataset(cfg, loader)
    draw = SampleDrawer(cfg, dataset, f'browse_{loader}')
    meta = draw.visualizer.dataset_meta
    bad = {}  # by file, what is known to be wrong with samples, which are loaded nevertheless

    def on_bad(file: str, why: str, loads: bool) -> bool:
        bad.setdefault(file, why)
        if not loads:  # or the data set would draw another one
            raise BadSampleError(f'{file}: {why}')
        return True

    guard(dataset, on_bad, lambda *_: None)
    count = min(count, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    folder.mkdir(parents=True, exist_ok=True)
    cells, occurring, problems = [], set(), []
    for index in track(chosen, loader, console=Console(stderr=True)):
        try:
            packed = dataset[index]
        except Exception as error:  # a pipeline is a program: it can raise anything
            problems.append(f'sample {index} cannot be loaded ({reason(error)})')
            continue
        sample = packed['data_samples']
        path = sample.metainfo.get('img_path')
        stem = Path(path).stem if isinstance(path, str) else 'sample'
        file = folder / f'{index:06d}_{stem}.png'
        problem = draw(packed, file)
        problems += [problem] if problem else []
        cells.append((caption(stem, sample, meta.get('classes')), file))
        occurring |= labels_of(sample)
    if bad or problems:
        first = [*(f'{file}: {why}' for file, why in bad.items()), *problems][0]
        said = (
            f'{loader}: {max(len(bad), len(problems))} of {count} samples are bad or cannot be '
            f'drawn; the first: {first}; mmslak check-dataset lists all'
        )
        if not cells:
            raise UserError(said)
        warn(said)
    print(f'{len(cells)} of {len(dataset)} samples: {folder}')
    classes, palette = meta.get('classes') or (), meta.get('palette') or ()
    names = {classes[i] for i in occurring if i < len(classes)}
    return cells, dict(zip(classes, palette)), names


def meta_to_draw(metainfo: dict) -> dict:
    """Meta information of a dataset with a colour for each class, which visualizers rely on."""
    classes, palette = metainfo.get('classes') or (), metainfo.get('palette')
    if not isinstance(palette, (list, tuple)) or len(palette) < len(classes):
        palette = distinct_colours(len(classes))
    return dict(metainfo, palette=[tuple(int(v) for v in colour) for colour in palette])


def caption(stem: str, sample: object, classes: Sequence[str] | None) -> str:
    """A picture's name, after that of its class if it has one."""
    if not classes or sample.get('gt_label') is None:
        return stem
    return ', '.join(classes[label] for label in sample.gt_label.tolist()) + f': {stem}'


def labels_of(sample: object) -> set[int]:
    """Classes that are drawn in colours: those of label maps and objects."""
    maps, instances = sample.get('gt_sem_seg'), sample.get('gt_instances')
    found = np.unique(maps.data).tolist() if maps is not None and 'data' in maps else []
    found += np.unique(instances.labels).tolist() if 'labels' in (instances or ()) else []
    return {int(label) for label in found}


def to_page(config: str, folder: Path, parts: dict[str, Cells], legend: Colours) -> str:
    """A page of the pictures, which lie in its folder."""
    body = [f'<h1>Samples of {html.escape(config)}</h1>']
    squares = (
        f'<span class="colour" style="background: rgb{tuple(map(int, colour))}"></span>'
        f'{html.escape(name)}'
        for name, colour in legend.items()
    )
    body.append(f'<p>{" ".join(squares)}</p>')
    for loader, cells in parts.items():
        body.append(f'<h2>{html.escape(loader)}</h2>')
        for name, file in cells:
            address = quote(file.relative_to(folder).as_posix())
            body.append(f'<a href="{html.escape(address)}">{figure(address, name)}</a>')
    return whole_page(f'Samples of {config}', body, STYLE, refers_to_files=True)


def has_unscaled_labels(dataset: object) -> bool:
    """Whether labels are loaded after the picture is resized, as for validation."""
    transforms = getattr(next(innermost(dataset)).pipeline, 'transforms', ())
    names = [type(transform).__name__ for transform in transforms]
    before = list(takewhile(lambda name: 'Annotations' not in name, names))
    return len(before) < len(names) and any('Resize' in name for name in before)


def picture_of(inputs: Tensor) -> np.ndarray:
    """Turns the picture that a pipeline packs into one that visualizers take.

    Args:
        inputs: (C, H, W), in BGR, as mmcv loads pictures. Of two channels the first is drawn, and
            of more than three, as of satellites and pairs of pictures, the first three. Values that
            are clearly not those of 8 bits are stretched between the least and the largest.

    Returns:
        (H, W, 3) uint8, in RGB.

    Raises:
        UserError: If the pipeline yields something else.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() != 3:
        what = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise UserError(f'the pipeline yields {what}: expected pictures of (channels, H, W)')
    picture = inputs[:3] if len(inputs) >= 3 else inputs[:1]
    if picture.dtype != torch.uint8:
        picture = picture.float().nan_to_num()
        least, largest = float(picture.min()), float(picture.max())
        normalised = largest <= 1 or (largest < NORMALISED and least < 0)
        if normalised or largest > DEEP:
            picture = (picture - least) * (255 / max(largest - least, 1e-9))
    picture = picture.flip(0).expand(3, -1, -1).permute(1, 2, 0)
    return np.ascontiguousarray(picture.clamp(0, 255).byte().numpy())


class SampleDrawer:
    """Draws samples with their labels, by the visualizer of the config's library.

    Args:
        cfg: The config.
        dataset: Where the samples come from.
        name: Of the visualizer.
    """

    def __init__(self, cfg: Config, dataset: object, name: str) -> None:
        self.visualizer = VISUALIZERS.build(dict(cfg.visualizer, name=name, vis_backends=None))
        self.visualizer.dataset_meta = meta_to_draw(dataset.metainfo)
        if cfg.get('default_scope') == 'mmseg' and 'alpha' not in cfg.visualizer:
            self.visualizer.alpha = TINT
        self.unscaled = has_unscaled_labels(dataset)

    def __call__(self, packed: dict, path: Path) -> str:
        """Writes the picture of a sample.

        Args:
            packed: The sample, as the dataset yields it.
            path: The file.

        Returns:
            Why its labels cannot be drawn, so that it has none; '' if they are.
        """
        picture, sample = picture_of(packed['inputs']), packed['data_samples']
        if self.unscaled:
            picture = mmcv.imresize(picture, sample.ori_shape[1::-1])
        options = dict(draw_pred=False, out_file=str(path))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of boxes that reach the border
                if hasattr(self.visualizer, 'visualize_cls'):  # mmpretrain's
                    self.visualizer.visualize_cls(picture, sample, **options)
                else:
                    _clip_boxes(sample, *picture.shape[:2])
                    self.visualizer.add_datasample(path.stem, picture, sample, **options)
                    _outline_regions(sample, self.visualizer.dataset_meta['palette'], path)
        except Exception as error:  # visualizers raise what they like
            mmcv.imwrite(mmcv.rgb2bgr(picture), str(path))
            return f'the labels of {path.stem} ({reason(error)})'
        return ''


def _outline_regions(sample: object, palette: Sequence[Sequence[int]], path: Path) -> None:
    """Adds to a drawn picture the borders of its label map, which mmseg's visualizer leaves out."""
    maps = sample.get('gt_sem_seg')
    if maps is not None and 'data' in maps:
        bgr = [colour[::-1] for colour in palette]
        mmcv.imwrite(outline(mmcv.imread(str(path)), np.asarray(maps.data)[0], bgr), str(path))


def _clip_boxes(sample: object, height: int, width: int) -> None:
    """Makes tensors of mmdet's boxes, which end at the border: what is drawn beyond shrinks it."""
    instances = sample.get('gt_instances')
    boxes = getattr(getattr(instances, 'bboxes', None), 'tensor', None)
    if boxes is None:
        return
    if boxes.shape[-1] == 4:
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))
    instances.bboxes = boxes
