"""The demo's detectors, on a laptop's CPU: boxes on PASCAL VOC's tree, boxes and masks on COCO's.

From the backbone that `mmslak run-demo` pre-trains (its first two steps, skipped where they are
done), Faster R-CNN and Cascade Mask R-CNN learn to find digits in photographs, the backbone's zeros
held. Everything is done by `mmslak train` and `mmslak test` on the configs of configs/demo. Exit
status 1 says that a score missed its bar, 2 that a step failed or that the zeros were not held
exactly.
"""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import mmengine
import numpy as np
from PIL import Image

import mmslak
from mmslak.cli.demo_page import Part, write_page
from mmslak.cli.parser import one_line_errors
from mmslak.cli.run_demo import (
    DemoError,
    check_zeros,
    demo_parser,
    digest,
    go_on,
    judge,
    options,
    parse,
    pretrain,
    train_and_test,
)
from mmslak.datasets import CLASSES, SEG_PALETTE

FASTER = 'mmslak::demo/faster_rcnn_slak_digit_scenes.py'
CASCADE = 'mmslak::demo/cascade_mask_rcnn_slak_digit_scenes.py'
VOC_MAP, BOX_AP50, MASK_AP50 = 'pascal_voc/mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP_50'
BARS = {VOC_MAP: 0.5, BOX_AP50: 0.5, MASK_AP50: 0.4}  # on held-out digits and photographs

# Two steps of four scenes. Without a threshold, what is not trained yet finds something to score.
QUICK = [
    'train_dataloader.batch_size=4',
    'train_cfg.max_epochs=1',
    'train_cfg.val_interval=1',
    'default_hooks.checkpoint.interval=1',
    'model.test_cfg.rcnn.score_thr=0.0',
]


def check_libraries() -> None:
    """Checks that detectors can run, which need more than `mmslak run-demo`.

    Raises:
        DemoError: If not.
    """
    missing = [name for name in ('mmdet', 'mmcv._ext') if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(
            f"detectors need mmdet and mmcv's compiled operators; there is no {missing[0]}: "
            '`make demo-detection` in a clone adds what is missing'
        )


def truths(coco: Path) -> dict[int, list[dict]]:
    """Digits of the held-out scenes, by the scene's number, as `show` takes them."""
    from pycocotools import mask

    content = json.loads((coco / 'annotations/instances_val2017.json').read_text())
    sides = {image['id']: (image['height'], image['width']) for image in content['images']}
    found = {number: [] for number in sides}
    for annotation in content['annotations']:
        number = annotation['image_id']
        x, y, width, height = annotation['bbox']
        parts = mask.frPyObjects(annotation['segmentation'], *sides[number])
        found[number].append(
            dict(
                label=annotation['category_id'] - 1,
                box=(x, y, x + width, y + height),
                mask=mask.decode(mask.merge(parts)),
            )
        )
    return found


def predictions(file: Path, threshold: float = 0.5) -> dict[int, list[dict]]:
    """What `mmslak test --out` wrote, above a score, by the scene's number, as `show` takes it."""
    from pycocotools import mask

    found = {}
    for sample in mmengine.load(file):
        instances = sample['pred_instances']
        masks = instances.get('masks', [None] * len(instances['labels']))
        found[int(Path(sample['img_path']).stem)] = [
            dict(
                label=int(label),
                box=box.tolist(),
                score=float(score),
                mask=None if encoded is None else mask.decode(encoded),
            )
            for label, box, score, encoded in zip(
                instances['labels'], instances['bboxes'], instances['scores'], masks, strict=True
            )
            if score >= threshold
        ]
    return found


def show(axis, image: np.ndarray, digits: list[dict]) -> None:
    """Draws a scene with its digits.

    Args:
        axis: Matplotlib's.
        image: (H, W, 3), uint8.
        digits: Of each its label, box (x1, y1, x2, y2 in pixels), perhaps mask (H, W) and score.
    """
    from matplotlib.patches import Rectangle

    pixels = image / 255
    for digit in digits:
        colour = np.array(SEG_PALETTE[1 + digit['label']]) / 255
        if digit.get('mask') is not None:
            pixels[digit['mask'] > 0] = 0.4 * pixels[digit['mask'] > 0] + 0.6 * colour
        x1, y1, x2, y2 = digit['box']
        # Matplotlib puts the centre of the first pixel at 0.
        axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=colour))
        score = f' {digit["score"]:.2f}' if 'score' in digit else ''
        text = f'{CLASSES[digit["label"]]}{score}'
        axis.text(x1, y1 - 3, text, color='white', fontsize=9, backgroundcolor=(*colour, 0.7))
    axis.imshow(pixels)
    axis.set_axis_off()


def draw(coco: Path, found: dict[str, Path], picture: Path, scenes: int = 4) -> None:
    """Draws test scenes, one per row: the truth and each prediction.

    Args:
        coco: The COCO tree of the digit scenes.
        found: Files of predictions by title.
        picture: PNG file to write.
        scenes: Number of rows.
    """
    import matplotlib.pyplot as plt

    columns = {'truth': truths(coco), **{title: predictions(f) for title, f in found.items()}}
    paths = sorted((coco / 'val2017').iterdir())[:scenes]
    figure, axes = plt.subplots(
        len(paths), len(columns), squeeze=False, figsize=(3 * len(columns), 3 * len(paths))
    )
    for row, path in zip(axes, paths, strict=True):
        image = np.asarray(Image.open(path))
        for axis, digits in zip(row, columns.values(), strict=True):
            show(axis, image, digits[int(path.stem)])
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, pad=14)
    figure.tight_layout()
    figure.savefig(picture, dpi=80)
    plt.close(figure)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Runs all steps and returns the scores, as fractions of one."""
    check_libraries()
    checkpoint, _, stamp = pretrain(args, steps=5)
    stamp = digest(stamp, checkpoint.read_bytes())

    print('Step 3 of 5: Faster R-CNN on scenes, from that backbone (1 to 2.5 minutes)', flush=True)
    faster_dir = args.work_dir / 'faster_rcnn'
    faster_options = [*options(args, 'voc/VOCdevkit', QUICK), f'checkpoint={checkpoint}']
    faster, scores = train_and_test(FASTER, faster_dir, faster_options, [VOC_MAP], stamp)

    print('Step 4 of 5: Cascade Mask R-CNN, likewise (2 to 6 minutes)', flush=True)
    cascade_dir = args.work_dir / 'cascade_mask_rcnn'
    cascade_options = [*options(args, 'coco', QUICK), f'checkpoint={checkpoint}']
    cascade, box_and_mask = train_and_test(
        CASCADE, cascade_dir, cascade_options, [BOX_AP50, MASK_AP50], stamp
    )

    print('Step 5 of 5: zeros and picture', flush=True)
    zeros = {detector: check_zeros(detector) for detector in (faster, cascade)}
    picture = args.work_dir / 'digit_boxes_and_masks.png'
    inputs, overlays = args.data / 'coco/val2017', args.work_dir / 'overlays_detection'
    found = {
        'Faster R-CNN': faster_dir / 'predictions.pkl',
        'Cascade Mask R-CNN': cascade_dir / 'predictions.pkl',
    }
    draw(args.data / 'coco', found, picture)

    scores = dict(zip(BARS, [*scores, *box_and_mask], strict=True))
    part = Part(
        title=f'Detection: two detectors with the small {args.backbone.rpartition(".")[2]}',
        scores=[(name, score, BARS[name]) for name, score in scores.items()],
        notes=[f'Backbone in {file.parent.name}: {text}.' for file, text in zeros.items()],
        pictures={'Held-out scenes: truth and predictions scored 0.5 or more': picture},
        files={
            'Checkpoint of the pre-trained backbone': checkpoint,
            'Checkpoint of Faster R-CNN': faster,
            'Checkpoint of Cascade Mask R-CNN': cascade,
        },
        commands=[
            go_on(args, 'demo', str(inputs), CASCADE, str(cascade), '--out', str(overlays)),
            go_on(args, 'complexity', CASCADE, str(cascade)),
        ],
        judged=not args.quick,
    )
    page = write_page(args.work_dir, 'detection', part)
    print()
    for (name, score), bar in zip(scores.items(), BARS.values(), strict=True):
        print(f'Held-out scenes: {name} {score:.3f} (bar: {bar:.2f})')
    for detector, text in zeros.items():
        print(f'Backbone:        {text} ({detector.parent.name})')
    print(f'Results:         {page}')
    return scores


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak run-demo-detection`."""
    return demo_parser('run-demo-detection', __doc__)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(build_parser(), argv)
    print(f'mmslak {mmslak.__version__} detection demo, 3 to 10 minutes on two CPU cores.')
    return judge(run, args, BARS)
