"""What is a bad sample, and what only looks like one."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from PIL import Image, ImageFile

from mmslak import cli
from mmslak.datasets.bad_samples import BadSampleError, BadSampleList, check_file, guard
from mmslak.engine import BadSampleHook
from tests.golden import ROOT
from tests.test_tools import load_main

CONTENT = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)


class Dataset(SimpleNamespace):
    """As datasets of OpenMMLab: a pipeline, and classes in metainfo."""

    def __len__(self) -> int:
        return 1


def passes(sample: dict, *transforms: object, **attributes: object) -> bool:
    """Whether a guarded pipeline lets a sample through."""
    found = []
    dataset = Dataset(
        pipeline=SimpleNamespace(transforms=transforms),
        metainfo=dict(classes=['a', 'b']),
        **attributes,
    )
    guard(dataset, lambda file, reason: found.append(reason))
    result = dataset.pipeline({key: str(value) for key, value in sample.items()})
    assert (result is None) == bool(found), found
    return not found


def save(path: Path, content: np.ndarray = CONTENT, **options) -> Path:
    Image.fromarray(content).save(path, **options)
    return path


# ---------------------------------------------------------------- label maps


def test_only_segmentation_datasets_know_the_values_of_label_maps(tmp_path):
    sample = dict(
        img_path=save(tmp_path / 'x.png'),
        seg_map_path=save(tmp_path / 'y.png', np.full((64, 80), 182, np.uint8)),
    )
    loading = LoadImageFromFile(), LoadAnnotations(with_bbox=False, with_label=False, with_seg=True)
    assert passes(sample, *loading)  # stuff of COCO: 182 of them, and 80 classes of things
    assert not passes(sample, *loading, ignore_index=255)
    assert passes(sample, *loading, ignore_index=182)
    sample['seg_map_path'] = save(tmp_path / 'z.png', np.zeros((60, 80), np.uint8))
    assert not passes(sample, *loading)


# ---------------------------------------------------------------- pictures of other kinds


class LoadImageFromNpyFile:
    """As mmseg's of that name."""

    def __call__(self, data: dict) -> dict:
        return dict(data, img=np.load(data['img_path']))


class LoadSingleRSImageFromFile:
    """As mmseg's: more than three channels."""

    def __call__(self, data: dict) -> dict:
        return dict(data, img=np.zeros((64, 80, 7), np.uint16))


class LoadBiomedicalImageFromFile:
    """As mmseg's: a volume, (modalities, depth, height, width)."""

    def __call__(self, data: dict) -> dict:
        return dict(data, img=np.zeros((1, 9, 64, 80)))


class LoadBiomedicalAnnotation:
    """As mmseg's."""

    def __call__(self, data: dict) -> dict:
        return dict(data, gt_seg_map=np.zeros((9, 64, 80)))


def test_what_is_no_picture_is_left_to_its_loader(tmp_path):
    np.save(tmp_path / 'x.npy', np.zeros((64, 80), np.uint16))
    array = dict(img_path=tmp_path / 'x.npy')
    assert passes(array, LoadImageFromNpyFile())
    (tmp_path / 'x.nii').write_bytes(b'n+1')
    volume = dict(img_path=tmp_path / 'x.nii', seg_map_path=tmp_path / 'x.nii')
    assert passes(volume, LoadSingleRSImageFromFile())
    loading = LoadBiomedicalImageFromFile(), LoadBiomedicalAnnotation()
    assert passes(volume, *loading, ignore_index=255)
    assert not passes(dict(img_path=tmp_path / 'gone.npy'), LoadImageFromNpyFile())


def test_depth_and_alpha_may_be_asked_for(tmp_path):
    deep = dict(img_path=save(tmp_path / 'deep.png', CONTENT[..., 0].astype(np.uint16)))
    alpha = dict(img_path=save(tmp_path / 'alpha.png', CONTENT[..., [0, 1, 2, 0]]))
    for sample in (deep, alpha):
        assert not passes(sample, LoadImageFromFile())
        assert passes(sample, LoadImageFromFile(color_type='unchanged'))
    tiff = dict(img_path=save(tmp_path / 'deep.tif', CONTENT[..., 0].astype(np.uint16)))
    loader = LoadImageFromFile(color_type='unchanged', imdecode_backend='tifffile')
    assert passes(tiff, loader)
    # Half of one is bad all the same.
    cut = tmp_path / 'cut.jpg'
    cut.write_bytes(save(tmp_path / 'x.jpg').read_bytes()[:2000])
    for color in ('color', 'unchanged', 'grayscale'):
        assert not passes(dict(img_path=cut), LoadImageFromFile(color_type=color))


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_colour_of_16_bits_is_cut_by_loaders(tmp_path, suffix):
    """Pillow calls it RGB, like any other."""
    path = str(tmp_path / f'x.{suffix}')
    for depth in (np.uint8, np.uint16):
        cv2.imwrite(path, CONTENT.astype(depth))
        if depth == np.uint8:
            check_file(path)
            continue
        with pytest.raises(BadSampleError, match='16 bits per channel, which are cut'):
            check_file(path)
        check_file(path, image=False)
        assert passes(dict(img_path=path), LoadImageFromFile(color_type='unchanged'))


@pytest.mark.parametrize('mode', ['1', 'P', 'L', 'CMYK'])
@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_pictures_of_fewer_bits_pass(tmp_path, suffix, mode):
    if (mode, suffix) != ('CMYK', 'png'):
        Image.fromarray(CONTENT).convert(mode).save(tmp_path / f'x.{suffix}')
        check_file(str(tmp_path / f'x.{suffix}'))


def test_pictures_that_are_not_on_the_disk_are_left_to_their_loader(tmp_path):
    class Elsewhere(LoadImageFromFile):
        def transform(self, data: dict) -> dict:
            return dict(data, img=CONTENT)

    Elsewhere.__name__ = 'LoadImageFromFile'
    loader = Elsewhere(backend_args=dict(backend='lmdb', db_path=str(tmp_path)))
    assert passes(dict(img_path='a/key.jpg'), loader)


# ---------------------------------------------------------------- truncated or appended to


@pytest.mark.parametrize('lenient', [False, True])
@pytest.mark.parametrize('kind', ['jpeg', 'png'])
def test_pixels_decide_where_the_end_is_not_at_the_end(tmp_path, monkeypatch, kind, lenient):
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', lenient)
    buffer = io.BytesIO()
    Image.fromarray(CONTENT).save(buffer, kind)
    whole = buffer.getvalue()
    path = tmp_path / 'x'
    path.write_bytes(whole + b'mp4 ' * 5000)  # a film after the picture, as telephones write
    check_file(str(path))
    for share in (0.1, 0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(BadSampleError, match='truncated'):
            check_file(str(path))
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES


# ---------------------------------------------------------------- lists


def test_a_line_that_is_half_written_does_not_count(tmp_path):
    several = BadSampleList(tmp_path / 'bad.jsonl')
    several.add('a', 'truncated')
    line = json.dumps(dict(file='b', reason='truncated'))
    for half in (line[:9], line[:-1], '7', '{}', '\0\0\xff'):
        several.path.write_bytes(several.path.read_bytes() + half.encode('latin1') + b'\n')
        assert several.count() == 1
    several.add('b', 'truncated')
    assert several.count() == 2


def test_a_line_after_a_half_written_one_counts(tmp_path):
    several = BadSampleList(tmp_path / 'bad.jsonl')
    several.path.write_text('{"file": "a", "rea')
    several.add('b', 'truncated')
    assert several.count() == 1


# ---------------------------------------------------------------- the tools

CONFIG = """
default_scope = 'mmdet'
model = dict(type='mmslak.SLaK')
train_dataloader = dict(dataset=dict(type='BaseDetDataset', ann_file={ann!r}, serialize_data=False,
    pipeline=[dict(type='mmcv.LoadImageFromFile')]))
"""


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A config whose dataset has one picture; its annotations are what is given."""
    monkeypatch.chdir(ROOT)
    # The tool sets the scope of its process.
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())
    picture = save(tmp_path / 'x.png')

    def make(annotations: object = None) -> str:
        whole = dict(metainfo={}, data_list=[dict(img_path=str(picture))])
        text = json.dumps(whole if annotations is None else annotations)
        (tmp_path / 'ann.json').write_text(text)
        path = tmp_path / 'config.py'
        path.write_text(CONFIG.format(ann=str(tmp_path / 'ann.json')))
        return str(path)

    return make


check_tool = load_main('check_dataset')


def test_the_list_gets_its_folder(dataset, tmp_path):
    out = tmp_path / 'new/folder/bad.jsonl'
    argv = ['--split', 'train', '--workers', '1', '--out', str(out)]
    assert check_tool([dataset(), *argv]) == 0
    (tmp_path / 'x.png').write_bytes(b'')
    assert check_tool([dataset(), *argv]) == 1
    assert len(out.read_text().splitlines()) == 1


def test_what_cannot_be_checked_is_one_line(dataset, tmp_path, capsys):
    def says(*argv: object) -> str:
        assert check_tool([*map(str, argv), '--split', 'train']) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert 'a folder' in says(dataset(), '--out', tmp_path)
    assert 'ann.json/bad' in says(dataset(), '--out', tmp_path / 'ann.json/bad')
    config = dataset(annotations=[1])
    assert 'train_dataloader.dataset (BaseDetDataset) cannot be built: TypeError' in says(config)


@pytest.mark.parametrize('workers', ['0', '-1', 'many'])
def test_workers_are_at_least_one(dataset, capsys, workers):
    with pytest.raises(SystemExit) as stop:
        check_tool([dataset(), '--workers', workers])
    assert stop.value.code == 2
    assert '--workers' in capsys.readouterr().err.splitlines()[-1]


def test_the_policy_of_a_hook_that_is_an_object():
    hook = BadSampleHook()
    cfg = Config(dict(model=ConfigDict(), custom_hooks=[hook]))
    cli.enable_survival(cfg, 'skip')
    assert cfg.custom_hooks[0].policy == 'skip'
    assert len(cfg.custom_hooks) == len(cli.SURVIVAL)
