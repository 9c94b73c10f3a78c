"""What the census of large data costs: seconds, and memory beyond what loading the data takes.

    python benchmarks/census.py [--pictures 118000] [--boxes 860000] [--maps 20000] [--out FOLDER]

It makes an annotation file of COCO's size and label maps of ADE20K's in a temporary folder, takes
the census of each in a process of its own, and prints one line of JSON for each.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image


def make_coco(root: Path, pictures: int, boxes: int) -> None:
    """A file of 80 categories with two polygons of 12 points per box, and empty pictures."""
    from mmdet.datasets import CocoDataset

    rng = np.random.default_rng(0)
    names = CocoDataset.METAINFO['classes']
    (root / 'img').mkdir(parents=True)
    images = [
        dict(id=i, file_name=f'{i:012}.jpg', width=640, height=480, license=1, flickr_url='x' * 60)
        for i in range(pictures)
    ]
    for image in images:
        (root / 'img' / image['file_name']).touch()
    corners = rng.uniform(0, 400, (boxes, 2)).round(2).tolist()
    sides = rng.uniform(2, 80, (boxes, 2)).round(2).tolist()
    of_picture = rng.integers(0, pictures, boxes).tolist()
    outlines = rng.uniform(0, 480, (1000, 24)).round(2).tolist()
    annotations = [
        dict(
            id=i, image_id=of_picture[i], category_id=i % 80 + 1, bbox=corners[i] + sides[i],
            area=sides[i][0] * sides[i][1], iscrowd=0, segmentation=[outlines[i % 1000]] * 2,
        )
        for i in range(boxes)
    ]  # fmt: skip
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(names)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / 'a.json').write_text(json.dumps(content))


def make_maps(root: Path, maps: int) -> None:
    """Label maps of 683×512 pixels, of which 50 are different, with a picture for each."""
    rng = np.random.default_rng(0)
    for folder in ('img', 'ann'):
        (root / folder).mkdir(parents=True)
    drawn = []
    for _ in range(50):
        blocks = rng.integers(0, 151, (16, 22), dtype=np.uint8)
        Image.fromarray(np.kron(blocks, np.ones((32, 31), np.uint8))).save(root / 'map.png')
        drawn.append((root / 'map.png').read_bytes())
    for i in range(maps):
        (root / f'ann/{i:06}.png').write_bytes(drawn[i % 50])
        (root / f'img/{i:06}.jpg').touch()


def dataset_of(kind: str, root: Path, lazy: bool) -> object:
    """The stock dataset of what was made."""
    if kind == 'coco':
        from mmdet.datasets import CocoDataset

        pipeline = [dict(type='mmdet.LoadAnnotations', with_mask=True)]
        return CocoDataset(
            ann_file=str(root / 'a.json'), data_prefix=dict(img=str(root / 'img')),
            filter_cfg=dict(filter_empty_gt=True, min_size=32), pipeline=pipeline, lazy_init=lazy,
        )  # fmt: skip
    from mmseg.datasets import ADE20KDataset

    prefix = dict(img_path=str(root / 'img'), seg_map_path=str(root / 'ann'))
    return ADE20KDataset(data_prefix=prefix, lazy_init=lazy)


def measure(kind: str, root: Path, what: str) -> None:
    """Prints seconds and peak memory of a census, or of loading the data."""
    from mmslak.datasets.census import take_census

    dataset = dataset_of(kind, root, lazy=True)
    before, start, cpu = begin_peak(), time.perf_counter(), time.process_time()
    found = take_census(dataset) if what == 'census' else dataset.full_init()
    seconds = time.perf_counter() - start
    line = dict(
        kind=kind, what=what, seconds=round(seconds, 2),
        cpu_seconds=round(time.process_time() - cpu, 2), gib=round(peak() - before, 2),
    )  # fmt: skip
    if what == 'census':
        line.update(pictures=found.pictures, findings=[f.kind for f in found.findings])
    print(json.dumps(line), flush=True)


def begin_peak() -> float:
    """Begins to look for the peak anew, from the memory that is in use now, in GiB.

    The peak before is that of the imports; that of getrusage, moreover, is at least the one of the
    process that started this one.
    """
    Path('/proc/self/clear_refs').write_text('5')
    return peak()


def peak() -> float:
    """The most memory that was in use since `begin_peak`, in GiB."""
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--pictures', type=int, default=118_000)
    parser.add_argument('--boxes', type=int, default=860_000)
    parser.add_argument('--maps', type=int, default=20_000)
    parser.add_argument('--out', type=Path, help='folder for the data [a temporary one]')
    parser.add_argument('--measure', nargs=2, metavar=('KIND', 'WHAT'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], args.out / args.measure[0], args.measure[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder)
        if not (out / 'coco').exists():
            make_coco(out / 'coco', args.pictures, args.boxes)
        if not (out / 'maps').exists():
            make_maps(out / 'maps', args.maps)
        for kind in ('coco', 'maps'):
            for what in ('census', 'loading'):
                command = [sys.executable, __file__, '--out', str(out), '--measure', kind, what]
                subprocess.run(command, check=True)


if __name__ == '__main__':
    main()
