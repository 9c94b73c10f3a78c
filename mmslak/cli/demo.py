"""Pictures, folders and videos in; overlays and JSON out. Segmentors, detectors, classifiers.

Examples:
    mmslak demo street.jpg configs/upernet_slak_t_ade20k.py iter_160000.pth
    mmslak demo photos/ clip.mp4 configs/cascade_mask_rcnn_slak_t_coco.py epoch_36.pth \\
        --out work_dirs/photos --score-thr 0.5

A segmentor's overlays have a legend of the classes below them, and NAME_labels.png holds the class
of every pixel. predictions.json has everything else, and keeps what earlier runs found in other
pictures. What cannot be read, and what the model does not run on, is named and left out; the exit
status is then 2.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from mmslak.apis.config import work_dir
from mmslak.apis.inference import Predictor, add_legend, is_picture
from mmslak.apis.model import default_device, read_model_config
from mmslak.cli.parser import (
    add_cfg_options,
    add_config,
    check_output,
    command_parser,
    one_line_errors,
)
from mmslak.datasets.samples import PICTURE_SUFFIXES
from mmslak.errors import UserError
from mmslak.fileio.absent import absent_input
from mmslak.fileio.atomic import write_atomically
from mmslak.ops.plans import locked

VIDEOS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.webm')
UNREADABLE = 'cannot be read as picture or video'
LEGEND_ROWS = 2  # below a video, whose frames are of one size


def find_inputs(given: Sequence[Path]) -> list[Path]:
    """The files, and those in folders (and below) that look like pictures or videos."""
    files = []
    for path in given:
        if path.is_dir():
            inside = [p for p in path.rglob('*') if p.suffix.lower() in PICTURE_SUFFIXES + VIDEOS]
            files += sorted(inside) or [path]  # an empty folder is reported like an unreadable file
        else:
            files.append(path)
    return files


def free_stem(path: Path, taken: set[str]) -> str:
    """The file's name without suffix, numbered if another input's results have it."""
    stem, number = path.stem, 2
    while taken & {stem, f'{stem}_labels'}:
        stem, number = f'{path.stem}_{number}', number + 1
    taken |= {stem, f'{stem}_labels'}
    return stem


def read_results(report: Path) -> dict[Path, dict]:
    """What earlier runs have written, by the picture; nothing if there is no file.

    Raises:
        UserError: If the file is not one of `mmslak demo`.
    """
    if not report.is_file():
        return {}
    try:
        entries = json.loads(report.read_text(encoding='utf-8'))
        return {Path(e['input']).resolve(): e for e in entries if e['overlay']}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f'{report} is not one that mmslak demo has written: choose another folder with --out'
        ) from error


def is_video(path: Path) -> bool:
    """Whether to try a file as a video: by its name, or because it is no picture."""
    suffix = path.suffix.lower()
    return suffix in VIDEOS or (
        suffix not in PICTURE_SUFFIXES and path.is_file() and not is_picture(path)
    )


def do_picture(predict: Predictor, path: Path, out: Path, stem: str, progress: Progress) -> dict:
    """Writes the overlay of a picture.

    Raises:
        UserError: If it cannot be read or the model does not run on it.
    """
    if not is_picture(path):
        raise UserError(UNREADABLE)
    prediction = predict(path)
    overlay = prediction.overlay
    entry = dict(input=os.path.abspath(path), overlay=f'{stem}.png', **prediction.found)
    if prediction.labels is not None:
        overlay = add_legend(overlay, prediction.legend)
        entry['labels'] = f'{stem}_labels.png'
        kind = np.uint8 if prediction.labels.max() < 256 else np.uint16
        Image.fromarray(prediction.labels.astype(kind)).save(out / entry['labels'])
    Image.fromarray(overlay).save(out / entry['overlay'])
    return entry


def frames_of(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """Its frames, (H, W, 3), BGR."""
    while True:
        more, frame = video.read()
        if not more:
            return
        yield frame


def do_video(predict: Predictor, path: Path, out: Path, stem: str, progress: Progress) -> dict:
    """Writes the overlay of a video, frame by frame.

    Raises:
        UserError: If it cannot be read, the model does not run on a frame, or OpenCV cannot write
            videos here.
    """
    video = cv2.VideoCapture(str(path))
    fps = video.get(cv2.CAP_PROP_FPS)
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    entries, writer = [], None
    target = out / f'{stem}.mp4'
    frames = frames_of(video)
    for frame in progress.track(frames, description=path.name, total=count or None):
        try:
            prediction = predict(frame)
        except UserError as error:
            if writer is not None:
                writer.release()
                target.unlink()  # a part of it would pass for all
            raise UserError(f'frame {len(entries) + 1}: {error}') from error
        overlay = prediction.overlay
        if prediction.labels is not None:
            overlay = add_legend(overlay, prediction.legend, LEGEND_ROWS)
        if writer is None:
            size = overlay.shape[1::-1]
            writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*'mp4v'), fps or 25, size)
            if not writer.isOpened():
                raise UserError(f'this OpenCV cannot write {target}')
        writer.write(np.ascontiguousarray(overlay[..., ::-1]))
        entries.append(prediction.found)
    video.release()
    if writer is None:
        raise UserError(UNREADABLE)
    writer.release()
    return dict(input=os.path.abspath(path), overlay=target.name, fps=fps, frames=entries)


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak demo`."""
    parser = command_parser('demo', __doc__)
    parser.add_argument('inputs', nargs='+', type=Path, metavar='INPUT', help='picture, folder …')
    add_config(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        type=Path,
        help='folder of results [demo in the work folder, work_dirs/CONFIG]',
    )
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='lowest score of a detection [0.3]'
    )
    parser.add_argument(
        '--device', default=default_device(), help='cpu, cuda, cuda:1 … [%(default)s]'
    )
    add_cfg_options(parser)
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)

    cfg = read_model_config(args.config, args.cfg_options)
    files = find_inputs(args.inputs)
    fault = absent_input(files)
    if fault:
        raise UserError(fault)
    args.out = args.out or Path(work_dir(cfg), 'demo')
    beside = [path for path in files if path.resolve().parent == args.out.resolve()]
    if beside:
        raise UserError(f'--out {args.out}: {beside[0]} is in it and could be overwritten')
    check_output(args.out, folder=True)
    predict = Predictor(cfg, args.checkpoint, args.device, args.score_thr)
    report, left_out = args.out / 'predictions.json', []
    with (
        locked(args.out, seconds=0) as is_alone,
        Progress(console=Console(stderr=True)) as progress,
    ):
        if not is_alone:
            raise UserError(
                f'--out {args.out}: another demo is writing there; wait for its end, or choose '
                'another folder'
            )
        results = read_results(report)
        stems = [Path(entry['overlay']).stem for entry in results.values()]
        taken = {name for stem in stems for name in (stem, f'{stem}_labels')}
        for path in progress.track(files, description='inputs'):
            do, before = do_video if is_video(path) else do_picture, results.get(path.resolve())
            stem = Path(before['overlay']).stem if before else free_stem(path, taken)
            try:
                entry = do(predict, path, args.out, stem, progress)
                results[path.resolve()] = dict(entry, checkpoint=args.checkpoint)
            except UserError as error:
                results.pop(path.resolve(), None)  # a video may have lost its overlay
                left_out.append(f'{path}: {error}')
        content = json.dumps(list(results.values()), indent=1, ensure_ascii=False) + '\n'
        write_atomically(report, content.encode())
    print(f'{len(files) - len(left_out)} of {len(files)} inputs done: {args.out}')
    if left_out:
        raise UserError(f'{len(left_out)} of {len(files)} inputs left out: {"; ".join(left_out)}')
