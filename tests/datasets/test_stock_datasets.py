"""Where a stock pipeline runs on a picture from the field, our checks let it.

Every pipeline of `_base_/datasets` in the three libraries, with pictures that are larger and
smaller than what it makes of them, grey, with alpha, turned by EXIF, with and without objects.
"""

import random
import sys
import warnings
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from PIL import Image

import mmslak  # noqa: F401
from mmslak.apis.config import LOADERS, innermost_datasets, resolve
from mmslak.datasets.guard import guard
from mmslak.datasets.samples import EXIF_ORIENTATION, BadSampleError
from tests.cli.stock_configs import folder

SIZES = {'large.jpg': (1500, 700), 'small.jpg': (61, 90), 'grey.jpg': (300, 200)}
SIZES |= {'alpha.png': (90, 120), 'turned.jpg': (120, 90), 'none.jpg': (200, 160)}
# Files, and pipelines times pictures, that run; no two pipelines are the same.
LEAST = dict(mmseg=(20, 200), mmdet=(20, 180), mmpretrain=(40, 300))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> dict[str, Path]:
    """Pictures with their label maps beside them, (name).map.png."""
    root, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    found = {}
    for name, (width, height) in SIZES.items():
        picture = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))
        options = {}
        if name == 'grey.jpg':
            picture = picture.convert('L')
        if name == 'alpha.png':
            picture = picture.convert('RGBA')
        if name == 'turned.jpg':
            options = dict(exif=Image.Exif())
            options['exif'][EXIF_ORIENTATION] = 6
            width, height = height, width
        found[name] = root / name
        picture.save(found[name], **options)
        labels = np.zeros((height, width), np.uint8)
        labels[: height // 2] = 1
        labels[-3:] = 255
        Image.fromarray(labels).save(root / f'{name}.map.png')
        np.save(root / f'{name}.npy', np.ones((height, width), np.float32))
        SIZES[name] = (width, height)
    return found


class One(SimpleNamespace):
    """A data set of one sample."""

    def __len__(self) -> int:
        return 1


def sample(path: Path, reduce_zero_label: bool) -> dict:
    """What the data sets of all three libraries say of a picture, in one."""
    width, height = SIZES[path.name]
    w, h = width // 2, height // 2
    boxes = [(5, 5, 5 + w, 5 + h), (-4, 3, w, height + 6), (9, 9, 9.4, 9.3)]
    polygons = [[x, y, x2, y, x2, y2, x, y2] for x, y, x2, y2 in boxes]
    instances = [
        dict(bbox=list(box), bbox_label=0, ignore_flag=0, mask=[polygon])
        for box, polygon in zip(boxes, polygons)
    ]
    return dict(
        img_path=str(path), img_path2=str(path), img_id=3, sample_idx=0,
        height=height, width=width, instances=[] if path.stem == 'none' else instances,
        seg_map_path=f'{path}.map.png', label_map=None, reduce_zero_label=reduce_zero_label,
        seg_fields=[], depth_map_path=f'{path}.map.png', gt_label=[1], text='a cat',
        segments_info=[dict(id=i, category=i, is_thing=not i) for i in (0, 1)],
    )  # fmt: skip


def pipelines(scope: str) -> Iterator[tuple[Config, dict, list]]:
    """(config, dataset, pipeline) of all files, each pipeline once."""
    seen = set()
    for path in sorted((folder(scope) / '_base_/datasets').rglob('*.py')):
        cfg = Config.fromfile(path, lazy_import=False)
        cfg.default_scope = scope
        for loader in filter(cfg.get, LOADERS):
            for _, dataset in innermost_datasets(cfg[loader].dataset, loader):
                steps = dataset.get('pipeline')
                if steps and repr(steps) not in seen and 'LoadImageFromFile' in repr(steps):
                    seen.add(repr(steps))
                    yield cfg, dataset, steps


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet', 'mmpretrain'])
def test_checks_pass_wherever_the_stock_pipeline_runs(scope, pictures, monkeypatch):
    # Of panoptic data sets mmdet wants a package that no registry has.
    utils = SimpleNamespace(rgb2id=lambda colour: colour[..., 0].astype(np.int64))
    monkeypatch.setitem(sys.modules, 'panopticapi', SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, 'panopticapi.utils', utils)
    init_default_scope(scope)
    files, ran = set(), 0
    for cfg, dataset, steps in pipelines(scope):
        kind = resolve(dataset, cfg)
        known, default = getattr(kind, 'METAINFO', {}), signature(kind or refuse).parameters
        reduce = 'reduce_zero_label' in default and default['reduce_zero_label'].default
        reduce = dataset.get('reduce_zero_label', reduce)
        for path in pictures.values():
            data = sample(path, bool(reduce))
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                expected = run(steps, data)
            if isinstance(expected, Exception):
                continue
            ran += 1
            files.add(cfg.filename)
            got = run(steps, data, known, **(dict(ignore_index=255) if scope == 'mmseg' else {}))
            assert type(got) is type(expected), (cfg.filename, path.name, got)
    assert (len(files), ran) >= LEAST[scope]


def refuse(file: str, reason: str, loads: bool) -> bool:
    raise BadSampleError(f'{file}: {reason}')


def run(steps: list[dict], data: dict, known: dict | None = None, **attributes) -> object:
    """A sample through a pipeline, guarded where `known` is given; or the error that ends it."""
    random.seed(0)
    np.random.seed(0)
    try:
        inner = One(pipeline=Compose(steps), metainfo=known, **attributes)
        if known is not None:
            guard(inner, refuse, lambda file, reason: None)
        return inner.pipeline(dict(data))
    except Exception as error:
        return error
