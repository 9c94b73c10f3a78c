"""Predictions for pictures, in one form for segmentors, detectors and classifiers."""

import re
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from mmslak.apis.model import init_model, test_dataset
from mmslak.datasets.palette import distinct_colours
from mmslak.errors import UserError, reason

TOP = 5  # classes of a classifier that are reported
TINT = 0.3  # share of a class's colour inside of its regions
ROW, SWATCH, GAP = 20, 12, 6  # pixels of a legend


@dataclass
class Prediction:
    """What was found in a picture.

    Attributes:
        overlay: (H, W, 3) uint8, RGB: the picture with what was found drawn on it.
        found: Plain values, for JSON.
        labels: (H, W) class of every pixel, of segmentors alone.
        legend: (name, colour) of the classes in the picture, the largest first, likewise.
    """

    overlay: np.ndarray
    found: dict
    labels: np.ndarray | None = None
    legend: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)


class Predictor:
    """Predicts and draws, with a segmentor, detector or classifier.

    Args:
        cfg: From `read_model_config`; of mmseg, mmdet or mmpretrain, with a test pipeline.
        checkpoint: File with all its weights; 'none' for random ones.
        device: Where it runs.
        threshold: Detections of a lower score are left out.

    Raises:
        UserError: If the config cannot be used so, or the checkpoint does not fit.
        CheckpointError: If the file cannot be read.
    """

    def __init__(
        self, cfg: Config, checkpoint: str, device: str = 'cpu', threshold: float = 0.3
    ) -> None:
        draw = dict(mmseg=self._segments, mmdet=self._detections, mmpretrain=self._labels)
        scope = cfg.get('default_scope')
        if scope not in draw:
            raise UserError(
                f'config {cfg.filename} is of scope {scope!r}: expected one of {", ".join(draw)}'
            )
        if not cfg.get('test_dataloader'):
            raise UserError(f'config {cfg.filename} has no test_dataloader')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the libraries warn about losses and registries
            self.model = init_model(cfg, checkpoint, device)
        self.threshold, self._draw = threshold, draw[scope]
        self.classes: Sequence[str] = self.model.dataset_meta.get('classes', ())

    def __call__(self, picture: str | Path | np.ndarray) -> Prediction:
        """Predicts for a file that is a picture (see `is_picture`), or an array (H, W, 3) in BGR.

        Raises:
            UserError: If the model does not run on it: too small, too flat …
        """
        import mmcv

        sample = self.sample(picture)
        given = picture if isinstance(picture, np.ndarray) else str(picture)
        return self.draw(mmcv.imread(given)[..., ::-1], sample)

    def sample(self, picture: str | Path | np.ndarray) -> BaseDataElement:
        """What the model finds, as `inference_model` gives it, on the CPU.

        Raises:
            UserError: See `__call__`.
        """
        with _one_line():
            return inference_model(self.model, picture).cpu()

    def draw(
        self,
        picture: np.ndarray,
        sample: BaseDataElement,
        threshold: float | None = None,
        opacity: float | None = None,
    ) -> Prediction:
        """Draws what was found, which stays as it is.

        Args:
            picture: (H, W, 3) uint8, RGB.
            sample: From `sample`.
            threshold: Detections of a lower score are left out; None takes the predictor's.
            opacity: Share of the colour in regions, boxes and masks; None takes what is usual.

        Raises:
            UserError: If it cannot be drawn.
        """
        with _one_line():
            threshold = self.threshold if threshold is None else threshold
            return self._draw(picture, sample, threshold, opacity)

    def class_name(self, label: int) -> str:
        """The name of a class; its number if it has none."""
        return self.classes[label] if label < len(self.classes) else str(label)

    def _segments(
        self,
        picture: np.ndarray,
        sample: BaseDataElement,
        threshold: float,
        opacity: float | None,
    ) -> Prediction:
        labels = sample.pred_sem_seg.data[0].numpy()
        values, pixels = np.unique(labels, return_counts=True)
        order = np.argsort(-pixels, kind='stable')
        classes = [
            dict(
                label=int(values[i]),
                name=self.class_name(int(values[i])),
                pixels=int(pixels[i]),
                share=round(float(pixels[i] / labels.size), 6),
            )
            for i in order
        ]
        own = self.model.dataset_meta.get('palette', ())
        count = max(len(own), int(labels.max()) + 1)
        palette = np.array([*own, *distinct_colours(count)[len(own) :]])
        legend = [(c['name'], tuple(palette[c['label']].tolist())) for c in classes]
        tint = TINT if opacity is None else opacity
        tinted = picture * (1 - tint) + palette[labels] * tint
        overlay = outline(tinted.astype(np.uint8), labels, palette)
        return Prediction(overlay, dict(size=list(labels.shape), classes=classes), labels, legend)

    def _detections(
        self,
        picture: np.ndarray,
        sample: BaseDataElement,
        threshold: float,
        opacity: float | None,
    ) -> Prediction:
        from mmdet.structures.mask import encode_mask_results
        from mmdet.visualization import DetLocalVisualizer

        instances = sample.pred_instances
        instances = instances[instances.scores >= threshold]
        shown = type(sample)(metainfo=sample.metainfo, pred_instances=instances)
        found = [
            dict(label=label, name=self.class_name(label), score=score, bbox=box)
            for label, score, box in zip(
                *(instances[key].tolist() for key in ('labels', 'scores', 'bboxes'))
            )
        ]
        if 'masks' in instances:
            for entry, mask in zip(found, encode_mask_results(instances.masks)):
                entry['mask'] = dict(mask, counts=mask['counts'].decode())
        drawer = DetLocalVisualizer(**({} if opacity is None else dict(alpha=opacity)))
        drawer.dataset_meta = self.model.dataset_meta
        drawer.add_datasample('', picture, shown, draw_gt=False, pred_score_thr=threshold)
        size = list(picture.shape[:2])
        return Prediction(drawer.get_image(), dict(size=size, instances=found))

    def _labels(
        self,
        picture: np.ndarray,
        sample: BaseDataElement,
        threshold: float,
        opacity: float | None,
    ) -> Prediction:
        from mmpretrain.visualization import UniversalVisualizer

        scores = sample.pred_score
        best = scores.topk(min(TOP, len(scores)))
        classes = [
            dict(label=int(i), name=self.class_name(int(i)), score=float(s))
            for s, i in zip(best.values, best.indices)
        ]
        drawer = UniversalVisualizer()
        drawer.visualize_cls(picture, sample, classes=self.classes or None, draw_gt=False)
        return Prediction(drawer.get_image(), dict(size=list(picture.shape[:2]), classes=classes))


@contextmanager
def _one_line():
    """Silences the libraries' warnings, one per picture, and makes one line of their errors."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # pipelines, models and drawing raise what they like
            raise UserError(
                f'the model does not run on it: {type(error).__name__}: {reason(error)}'
            ) from error


def inference_model(
    model: nn.Module, img: str | Path | np.ndarray | Sequence[str | Path | np.ndarray]
) -> BaseDataElement | list[BaseDataElement]:
    """Predicts for pictures with a segmentor, detector or classifier.

    Args:
        model: From `init_model`; its config has a test pipeline.
        img: A file, or an array (H, W, 3) of uint8 in BGR, as OpenCV reads it; or a list of these,
            which are predicted one by one.

    Returns:
        The library's data sample, on the model's device; a list of them for a list. It is a
        SegDataSample of mmseg with `pred_sem_seg.data` (1, H, W), a DetDataSample of mmdet with
        `pred_instances` (bboxes, labels, scores, masks), or a DataSample of mmpretrain with
        `pred_score` and `pred_label` (mmpretrain's own `inference_model` returns a dict).

    Raises:
        UserError: If a file does not exist, or an array is of another shape.

    Examples:
        >>> from mmslak.apis import inference_model, init_model
        >>> model = init_model(
        ...     'mmslak::upernet_slak_t_ade20k', 'checkpoints/upernet_slak_tiny_ade20k.pth'
        ... )
        >>> labels = inference_model(model, 'street.jpg').pred_sem_seg.data[0]
    """
    pictures = img if isinstance(img, (list, tuple)) else [img]
    samples = []
    for picture in pictures:
        with torch.no_grad():
            samples += model.test_step(prepare(model, picture))
    return samples if pictures is img else samples[0]


def prepare(model: nn.Module, picture: str | Path | np.ndarray) -> dict:
    """A batch of one picture, as the model's data_preprocessor takes it.

    Raises:
        UserError: See `inference_model`.
    """
    init_default_scope(model.cfg.default_scope)
    return pseudo_collate([_test_pipeline(model.cfg, picture)(_pipeline_input(picture))])


def _test_pipeline(cfg: Config, picture: object) -> Compose:
    """The test pipeline without annotations; for an array without what loads a picture, too."""
    left_out = 'Annotations|LoadImage' if isinstance(picture, np.ndarray) else 'Annotations'
    steps = test_dataset(cfg).pipeline
    return Compose([step for step in steps if not re.search(left_out, str(step.type))])


def _pipeline_input(picture: str | Path | np.ndarray) -> dict:
    if not isinstance(picture, np.ndarray):
        if '://' not in str(picture) and not Path(picture).is_file():
            raise UserError(f'{picture}: no such file')
        return dict(img_path=str(picture), img_id=0)
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise UserError(
            f'an array of the shape {picture.shape}: expected a picture of (height, width, 3), BGR'
        )
    shape = picture.shape[:2]
    return dict(img=picture, img_path=None, img_id=0, img_shape=shape, ori_shape=shape)


def is_picture(path: str | Path) -> bool:
    """Whether the libraries can read a file as a picture."""
    import mmcv

    try:
        return Path(path).is_file() and mmcv.imread(str(path)) is not None
    except Exception:  # decoders raise what they like
        return False


def outline(
    picture: np.ndarray, labels: np.ndarray, palette: Sequence[Sequence[int]]
) -> np.ndarray:
    """Draws the border of every region in the full colour of its class.

    A tint mixes with what is below it, so that it can look like another class; a border cannot.

    Args:
        picture: (H, W, 3) uint8.
        labels: (H, W) class of every pixel. What is of no class, such as 255, gets no border.
        palette: Colour of each class.

    Returns:
        (H, W, 3) uint8. The border is inside of its region: one pixel wide, more in large pictures.
    """
    width = 1 + max(labels.shape) // 500
    around = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    values = labels.astype(np.float32)  # of the integer types OpenCV takes the small ones alone
    border = cv2.dilate(values, around) != cv2.erode(values, around)
    border &= labels < len(palette)
    drawn = picture.copy()
    drawn[border] = np.asarray(palette)[labels[border]]
    return drawn


def add_legend(
    overlay: np.ndarray, legend: Sequence[tuple[str, Sequence[int]]], rows: int | None = None
) -> np.ndarray:
    """Names and colours of classes below a picture.

    Args:
        overlay: (H, W, 3) uint8.
        legend: (name, colour) of each.
        rows: Rows of text; what does not fit is left out. None takes as many as are needed.

    Returns:
        (H + rows · 20, W, 3) uint8.
    """
    font = ImageFont.load_default()
    places, x, row = [], GAP, 0
    width = overlay.shape[1]
    for name, colour in legend:
        needed = SWATCH + GAP // 2 + int(font.getlength(name)) + 2 * GAP
        if x > GAP and x + needed > width:
            x, row = GAP, row + 1
        places.append((x, row, name, colour))
        x += needed
    rows = row + 1 if rows is None else rows
    strip = Image.new('RGB', (width, rows * ROW), 'white')
    draw = ImageDraw.Draw(strip)
    for x, row, name, colour in places:
        top = row * ROW + (ROW - SWATCH) // 2
        fill = tuple(int(c) for c in colour)
        draw.rectangle((x, top, x + SWATCH, top + SWATCH), fill=fill, outline='black')
        draw.text((x + SWATCH + GAP // 2 + 1, top), name, fill='black', font=font)
    return np.concatenate([overlay, np.asarray(strip)])
