"""What is a bad sample, and what only looks like one."""

import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import (
    Compose,
    LoadAnnotations,
    LoadImageFromFile,
    RandomChoice,
    TestTimeAug,
    TransformBroadcaster,
)
from PIL import Image, ImageFile

from mmslak.datasets import guard as guards
from mmslak.datasets import samples
from mmslak.datasets.guard import guard
from mmslak.datasets.samples import (
    ALPHA,
    BEYOND,
    DEEP,
    GREY,
    RESIZED,
    TINY,
    TURNED,
    BadSampleError,
    check_boxes,
    check_file,
    check_label_map,
    check_picture,
    check_stated_size,
)

CONTENT = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)


class Dataset(SimpleNamespace):
    """As datasets of OpenMMLab: a pipeline, and classes in metainfo; of one sample or `length`."""

    length = 1

    def __len__(self) -> int:
        return self.length


def findings(sample: dict, *transforms: object, **attributes: object) -> tuple[list, list]:
    """What a guarded pipeline finds bad, and odd, about a sample."""
    bad, odd = [], []
    dataset = Dataset(
        pipeline=Compose(list(transforms)), metainfo=dict(classes=['a', 'b']), **attributes
    )
    guard(
        dataset,
        lambda file, reason, loads: bad.append(reason),
        lambda file, reason: odd.append(reason),
    )
    data = {k: str(v) if isinstance(v, Path) else v for k, v in sample.items()}
    result = dataset.pipeline(data)
    assert (result is None) == bool(bad), bad
    return bad, odd


def passes(sample: dict, *transforms: object, **attributes: object) -> bool:
    """Whether a guarded pipeline lets a sample through."""
    return not findings(sample, *transforms, **attributes)[0]


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


def test_depth_and_alpha_are_odd_where_they_are_lost(tmp_path):
    deep = dict(img_path=save(tmp_path / 'deep.png', CONTENT[..., 0].astype(np.uint16)))
    alpha = dict(img_path=save(tmp_path / 'alpha.png', CONTENT[..., [0, 1, 2, 0]]))
    for sample, odd in ((deep, [DEEP]), (alpha, [ALPHA])):
        assert findings(sample, LoadImageFromFile()) == ([], odd)
        assert findings(sample, LoadImageFromFile(color_type='unchanged')) == ([], [])
    tiff = dict(img_path=save(tmp_path / 'deep.tif', CONTENT[..., 0].astype(np.uint16)))
    loader = LoadImageFromFile(color_type='unchanged', imdecode_backend='tifffile')
    assert findings(tiff, loader) == ([], [])
    # Half of one is bad all the same.
    cut = tmp_path / 'cut.jpg'
    cut.write_bytes(save(tmp_path / 'x.jpg').read_bytes()[:2000])
    for color in ('color', 'unchanged', 'grayscale'):
        assert not passes(dict(img_path=cut), LoadImageFromFile(color_type=color))


def test_a_loader_that_leaves_out_what_it_cannot_read_does_so(tmp_path):
    dataset = Dataset(pipeline=Compose([LoadImageFromFile(ignore_empty=True)]), metainfo={})
    guard(dataset, raises, raises)
    assert dataset.pipeline(dict(img_path=str(tmp_path / 'gone.jpg'))) is None


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_colour_of_16_bits_is_cut_by_loaders(tmp_path, suffix):
    """Pillow calls it RGB, like any other."""
    path = str(tmp_path / f'x.{suffix}')
    for depth, odd in ((np.uint8, []), (np.uint16, [DEEP])):
        cv2.imwrite(path, CONTENT.astype(depth))
        assert check_picture(path, colour=True, turned=True) == odd
        assert check_picture(path, colour=False, turned=True) == check_file(path) == []


def test_what_pillow_does_not_take_is_left_to_the_loader(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / 'x.hdr'), CONTENT.astype(np.float32))
    assert check_picture(str(tmp_path / 'x.hdr'), colour=True, turned=True) == []
    assert passes(dict(img_path=tmp_path / 'x.hdr'), LoadImageFromFile())
    # Aerial pictures are larger than Pillow's limit against bombs.
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    for suffix in ('png', 'tif', 'jpg'):
        path = save(tmp_path / f'x.{suffix}')
        assert findings(dict(img_path=path), LoadImageFromFile()) == ([], [])


@pytest.mark.parametrize('mode', ['1', 'P', 'L', 'CMYK'])
@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_pictures_of_fewer_bits_pass(tmp_path, suffix, mode):
    if (mode, suffix) != ('CMYK', 'png'):
        Image.fromarray(CONTENT).convert(mode).save(tmp_path / f'x.{suffix}')
        odd = dict(P=[], CMYK=[samples.CMYK]).get(mode, [GREY])
        assert check_picture(str(tmp_path / f'x.{suffix}'), colour=True, turned=True) == odd


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


# ---------------------------------------------------------------- labels at the picture's own size


class Shrink:
    """As Resize: picture, label map and boxes of half the size."""

    def __call__(self, data: dict) -> dict:
        data['img'] = data['img'][::2, ::2]
        data['img_shape'] = data['img'].shape[:2]
        for key in ('gt_seg_map', 'gt_depth_map'):
            if key in data:
                data[key] = data[key][::2, ::2]
        return data


class LoadDepthAnnotation:
    """As mmseg's."""

    def __call__(self, data: dict) -> dict:
        return dict(data, gt_depth_map=np.load(data['depth_map_path']))


class LoadProposals:
    """As mmdet's: loads, late in a pipeline, something else."""

    def __call__(self, data: dict) -> dict:
        return dict(data, proposals=np.zeros((1, 4)))


LABELS = LoadAnnotations(with_bbox=False, with_label=False, with_seg=True)
ORDERS = {
    'as in training': lambda: [LoadImageFromFile(), LABELS, Shrink(), LoadProposals()],
    'as in validation': lambda: [LoadImageFromFile(), Shrink(), LABELS],
    'labels first': lambda: [LABELS, LoadImageFromFile(), Shrink()],
    'of a view': lambda: [LoadImageFromFile(), RandomChoice([[Shrink(), LABELS]])],
    'broadcast': lambda: [
        LoadImageFromFile(),
        Shrink(),
        TransformBroadcaster(
            [LABELS],
            mapping=dict(seg_map_path=['seg_map_path'], ori_shape=['ori_shape']),
            remapping=dict(gt_seg_map=['gt_seg_map']),
            auto_remap=False,
        ),
    ],
}


@pytest.mark.parametrize('order', ORDERS)
def test_label_maps_are_compared_with_the_picture_as_it_was_loaded(tmp_path, order):
    sample = dict(
        img_path=save(tmp_path / 'x.jpg'),
        seg_map_path=save(tmp_path / 'x.png', np.zeros((64, 80), np.uint8)),
    )
    assert findings(sample, *ORDERS[order](), ignore_index=255) == ([], [])
    save(tmp_path / 'x.png', np.zeros((32, 40), np.uint8))  # that of the resized picture
    ((reason,), _) = findings(sample, *ORDERS[order](), ignore_index=255)
    assert 'a label map of 40×32, 80×64, the size of its picture, expected' in reason
    save(tmp_path / 'x.png', np.full((64, 80), 2, np.uint8))
    ((reason,), _) = findings(sample, *ORDERS[order](), ignore_index=255)
    assert 'class 2; there are 2' in reason


def test_labels_inside_of_test_time_augmentation(tmp_path):
    """As in mmseg's tta_pipeline."""
    sample = dict(
        img_path=save(tmp_path / 'x.jpg'),
        seg_map_path=save(tmp_path / 'x.png', np.zeros((64, 80), np.uint8)),
    )
    views = lambda: TestTimeAug([[Shrink(), LoadProposals()], [LABELS]])  # noqa: E731
    assert findings(sample, LoadImageFromFile(), views()) == ([], [])
    save(tmp_path / 'x.png', np.zeros((32, 40), np.uint8))
    assert not passes(sample, LoadImageFromFile(), views())


def test_depth_maps_are_compared_too(tmp_path):
    sample = dict(img_path=save(tmp_path / 'x.jpg'), depth_map_path=tmp_path / 'x.npy')
    for shape, good in (((64, 80), True), ((32, 40), False)):
        np.save(tmp_path / 'x.npy', np.ones(shape, np.float32))
        loading = LoadImageFromFile(), Shrink(), LoadDepthAnnotation()
        assert passes(sample, *loading, ignore_index=255) == good


def test_a_guarded_pipeline_is_guarded_anew_and_survives_pickling(tmp_path):
    dataset = Dataset(pipeline=Compose([LoadImageFromFile()]), metainfo={})
    for _ in range(3):
        guard(dataset, raises, raises)
        dataset.pipeline = pickle.loads(pickle.dumps(dataset.pipeline))
    assert repr(dataset.pipeline.transforms[0]) == repr(LoadImageFromFile())
    with pytest.raises(BadSampleError, match=r'^gone.jpg: no such file$'):
        dataset.pipeline(dict(img_path='gone.jpg'))


def raises(file: str, reason: str, loads: bool = True) -> bool:
    raise BadSampleError(f'{file}: {reason}')


# ---------------------------------------------------------------- boxes


def boxes_of(*boxes: tuple, **more: object) -> dict:
    return dict(gt_bboxes=boxes, ori_shape=(64, 80), img_path='x.jpg', **more)


def test_boxes():
    assert check_boxes(boxes_of((0, 0, 80, 64), (10, 10, 11, 12))) == []
    assert check_boxes(boxes_of((-1, 0, 80.9, 64))) == []  # formats differ by a pixel
    assert check_boxes(boxes_of((0, 0, 82, 64))) == [BEYOND]
    assert check_boxes(boxes_of((0, -1.5, 80, 64))) == [BEYOND]
    assert check_boxes(boxes_of((10, 10, 10.4, 12), (0, 0, 99, 99))) == [TINY, BEYOND]
    for box in (
        (10, 10, 9, 20),
        (10, 10, 10, 20),
        (10, 20, 20, 10),
        (0, 0, float('nan'), 5),
        (0, 0, 5, float('inf')),
    ):
        with pytest.raises(BadSampleError, match=r'^x\.jpg: a box that is turned around, '):
            check_boxes(boxes_of((0, 0, 5, 5), box))
        assert check_boxes(boxes_of((0, 0, 5, 5), box, gt_ignore_flags=[False, True])) == []


@pytest.mark.parametrize('kind', ['list', 'numpy', 'torch', 'mmdet'])
def test_boxes_of_any_container_and_none_at_all(kind):
    from mmdet.structures.bbox import HorizontalBoxes

    make = dict(
        list=list,
        numpy=lambda rows: np.array(rows, np.float32).reshape(-1, 4),
        torch=lambda rows: torch.tensor(rows).reshape(-1, 4),
        mmdet=lambda rows: HorizontalBoxes(torch.tensor(rows).reshape(-1, 4)),
    )[kind]
    assert check_boxes(dict(gt_bboxes=make([]))) == []
    assert check_boxes(dict(gt_bboxes=make([(0.0, 0.0, 5.0, 5.0)]))) == []
    with pytest.raises(BadSampleError):
        check_boxes(dict(gt_bboxes=make([(5.0, 0.0, 0.0, 5.0)])))


def test_rotated_boxes_and_polygons_are_not_these():
    for sides in (5, 8):
        assert check_boxes(dict(gt_bboxes=np.full((3, sides), -1.0))) == []


# ---------------------------------------------------------------- EXIF orientation


def turned_picture(path: Path, orientation: int) -> Path:
    """80 × 64 on the disk; loaders make 64 × 80 of it from orientation 5 on."""
    exif = Image.Exif()
    exif[samples.EXIF_ORIENTATION] = orientation
    return save(path, exif=exif)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
def test_exif_that_exchanges_the_sides_moves_boxes(tmp_path, orientation, backend):
    path = turned_picture(tmp_path / 'x.jpg', orientation)
    upright, turned = dict(height=64, width=80), dict(height=80, width=64)
    odd = [TURNED] if orientation > 1 else []
    loader = LoadImageFromFile(imdecode_backend=backend)
    agrees, other = (turned, upright) if orientation >= 5 else (upright, turned)
    assert findings(dict(img_path=path, **agrees), loader) == ([], odd)
    bad, found = findings(dict(img_path=path, **other), loader)
    if orientation >= 5:
        assert len(bad) == 1
        assert 'loaded as 64×80' in bad[0]
        assert f'orientation is {orientation}, but the annotations are for 80×64' in bad[0]
    else:
        assert (bad, found) == ([], [*odd, RESIZED])
    # What the message advises: the picture as it lies on the disk.
    raw = LoadImageFromFile(imdecode_backend=backend, color_type='color_ignore_orientation')
    assert findings(dict(img_path=path, **upright), raw) == ([], [])


def test_exif_beside_a_label_map(tmp_path):
    sample = dict(img_path=turned_picture(tmp_path / 'x.jpg', 6), seg_map_path=tmp_path / 'x.png')
    save(tmp_path / 'x.png', np.zeros((80, 64), np.uint8))
    assert findings(sample, LoadImageFromFile(), LABELS) == ([], [TURNED])
    save(tmp_path / 'x.png', np.zeros((64, 80), np.uint8))
    ((reason,), _) = findings(sample, LoadImageFromFile(), LABELS)
    assert reason.endswith('64×80, the size of its picture, expected (loaded as its EXIF '
                           'orientation, 6, says)')  # fmt: skip


def test_a_stated_size_that_says_nothing():
    for size in (dict(), dict(height=0, width=0), dict(height=None, width=None), dict(height='64')):
        assert check_stated_size(dict(ori_shape=(64, 80), **size), turned=True) == []
    assert check_stated_size(dict(ori_shape=(64, 80), height=640, width=800), True) == [RESIZED]


# ---------------------------------------------------------------- checks that fail themselves


def nonsense(*args: object) -> object:
    return 5


def broken(*args: object) -> object:
    raise ZeroDivisionError('a fault\nof the check')


CHECKS = ('check_picture', 'check_file', 'check_stated_size', 'check_label_map', 'check_boxes')


class LoadBoxes:
    """Boxes, and what a data set states."""

    def __call__(self, data: dict) -> dict:
        return dict(data, gt_bboxes=[(0, 0, 5, 5)])


@pytest.mark.parametrize('fault', [nonsense, broken, lambda *args: None, lambda *args: [None, 3]])
@pytest.mark.parametrize('check', CHECKS)
def test_a_fault_of_a_check_stops_nothing(tmp_path, monkeypatch, check, fault):
    monkeypatch.setattr(guards, check, fault)
    sample = dict(
        img_path=save(tmp_path / 'x.jpg'),
        seg_map_path=save(tmp_path / 'x.png', np.zeros((64, 80), np.uint8)),
        height=64,
        width=80,
    )
    loading = LoadImageFromFile(), LABELS, LoadBoxes()
    bad, odd = findings(sample, *loading, ignore_index=255)
    assert bad == []
    assert odd
    if fault is broken:
        said = 'ended with ZeroDivisionError: a fault of the check'
        assert all(reason.startswith('not checked, since ') for reason in odd)
        assert all(reason.endswith(said) for reason in odd)


@pytest.mark.parametrize('sample', [
    dict(gt_seg_map='not an array', ori_shape=(64, 80)),
    dict(gt_seg_map=np.zeros((64, 80)), ori_shape=None),
    dict(gt_seg_map=np.zeros((3, 64, 80)), ori_shape=(3, 64, 80)),
])  # fmt: skip
def test_containers_of_others_are_no_label_maps(sample):
    assert check_label_map(sample, 'gt_seg_map', 2) == []
