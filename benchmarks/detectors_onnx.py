"""AP of exported detectors, run without PyTorch, beside PyTorch's, on held-out digit scenes.

Example:
    mmslak run-demo-detection
    python benchmarks/detectors_onnx.py --out   # benchmarks/results/MACHINE/detectors_onnx_cpu.json

Takes the detectors of that demo, and a RetinaNet from the same backbone, which it trains. Each is
exported by `mmslak export`, whose check runs; the graph then predicts in a process of its own, by
onnxruntime, and COCO's evaluation judges both: a difference of more than 0.5 points is an error.
Needs the extra `deploy`. Nine minutes on two cores, with the demo done.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from timing import RESULTS, environment, machine, save

from mmslak.apis import inference_model, init_model
from mmslak.cli.run_demo import call, digest, train_and_test
from mmslak.cli.run_demo_detection import CASCADE, FASTER

RETINANET = 'mmslak::demo/retinanet_slak_digit_scenes.py'
BOX_AP = 'coco/bbox_mAP'
SCRIPT = Path(__file__).with_name('onnx_detector.py')
SCALE = ('160', '160')  # of the configs' test pipeline
TOLERANCE = 0.5  # points of AP


def by_pytorch(config: str, checkpoint: Path, files: Sequence[Path]) -> list[dict]:
    """What the model finds, by the config's test pipeline, as onnx_detector.py writes it."""
    from pycocotools import mask

    model, found = init_model(config, checkpoint, 'cpu'), []
    for file in files:
        objects = inference_model(model, file).pred_instances.numpy()
        masks = objects.get('masks', [None] * len(objects))
        for box, score, label, pixels in zip(
            objects.bboxes.tolist(), objects.scores.tolist(), objects.labels.tolist(), masks
        ):
            x1, y1, x2, y2 = box
            entry = dict(image_id=file.name, category_id=label, score=score)
            entry['bbox'] = [x1, y1, x2 - x1, y2 - y1]
            if pixels is not None:
                entry['segmentation'] = mask.encode(np.asfortranarray(pixels))
            found.append(entry)
    return found


def by_onnxruntime(graph: Path, pictures: Path) -> list[dict]:
    """What the graph finds, in a process without PyTorch."""
    out = graph.with_suffix('.json')
    script = [str(SCRIPT), str(graph), str(pictures), '--scale', *SCALE, '--out', str(out)]
    ended = subprocess.run([sys.executable, *script], capture_output=True, text=True, check=True)
    assert 'PyTorch loaded: False' in ended.stdout
    return json.loads(out.read_text())


def average_precision(truth: COCO, found: list[dict]) -> dict[str, float]:
    """AP of boxes, and of masks if there are any, in percent."""
    numbers = {image['file_name']: image['id'] for image in truth.imgs.values()}
    scores = {}
    with contextlib.redirect_stdout(io.StringIO()):
        results = truth.loadRes(
            [
                entry
                | dict(image_id=numbers[entry['image_id']], category_id=1 + entry['category_id'])
                for entry in found
            ]
        )
        for kind in ('bbox', 'segm') if 'segmentation' in found[0] else ('bbox',):
            evaluation = COCOeval(truth, results, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores[kind] = 100 * float(evaluation.stats[0])
    return scores


def checkpoints(args: argparse.Namespace) -> dict[str, tuple[str, Path]]:
    """Config and checkpoint of each detector."""
    found = {}
    for title, config, folder in (
        ('Faster R-CNN', FASTER, 'faster_rcnn'),
        ('Cascade Mask R-CNN', CASCADE, 'cascade_mask_rcnn'),
    ):
        done = args.demo / folder / 'done.json'
        if not done.is_file():
            raise SystemExit(f'{done} not found: run `mmslak run-demo-detection` first')
        found[title] = config, Path(json.loads(done.read_text())['checkpoint'])
    backbone = args.demo / 'slak_digits/epoch_12.pth'
    options = [f'data_root={args.data}/coco', f'checkpoint={backbone}']
    stamp = digest(backbone.read_bytes())
    checkpoint, _ = train_and_test(RETINANET, args.work_dir / 'retinanet', options, [BOX_AP], stamp)
    return {**found, 'RetinaNet': (RETINANET, checkpoint)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ('demo', 'work_dirs/demo'),
        ('data', 'data/digit_scenes'),
        ('work-dir', 'work_dirs/detectors_onnx'),
    ):
        parser.add_argument(f'--{name}', type=Path, default=Path(default), help='[%(default)s]')
    parser.add_argument(
        '--out',
        nargs='?',
        const=RESULTS / machine() / 'detectors_onnx_cpu.json',
        metavar='FILE',
        help='JSON file to write; without FILE that of this machine in benchmarks/results',
    )
    args = parser.parse_args(argv)
    pictures = args.data / 'coco/val2017'
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(args.data / 'coco/annotations/instances_val2017.json')
    result, missed = environment() | dict(pictures=len(truth.imgs), table={}), 0
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for title, (config, checkpoint) in checkpoints(args).items():
        graph = args.work_dir / f'{checkpoint.parent.name}.onnx'
        more = ['--images', str(pictures), '--shape', *SCALE, '--out', str(graph)]
        log = call(
            'export', [config, str(checkpoint), '--to', 'onnx', *more], graph.with_suffix('.log')
        )
        print(log)
        theirs = average_precision(
            truth, by_pytorch(config, checkpoint, sorted(pictures.iterdir()))
        )
        ours = average_precision(truth, by_onnxruntime(graph, pictures))
        row = result['table'][title] = {}
        for kind, name in (('bbox', 'box AP'), ('segm', 'mask AP')):
            if kind in theirs:
                row |= {f'{name}, PyTorch': theirs[kind], f'{name}, onnxruntime': ours[kind]}
                met = abs(theirs[kind] - ours[kind]) <= TOLERANCE
                missed += not met
                state = 'met' if met else 'MISSED'
                print(f'{state}: {title}: {name} {theirs[kind]:.2f} and {ours[kind]:.2f}')
        save(result, args.out)
    if missed:
        raise SystemExit(f'{missed} differ by more than {TOLERANCE} points')


if __name__ == '__main__':
    main()
