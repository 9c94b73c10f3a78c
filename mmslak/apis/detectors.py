"""A whole detector of mmdet as one ONNX graph of standard operators, written by mmdeploy."""

import functools
import importlib
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmslak.apis.detector_steps import follow_mmdet, of_labels
from mmslak.apis.model import quiet
from mmslak.errors import UserError, reason

OPSET = 16  # the first in which RoiAlign is a standard operator as mmcv computes it
BACKEND = 'onnxruntime'
# With its dependencies, pip would put other versions of MMEngine, onnx and protobuf here.
INSTALL = 'pip install aenum grpcio multiprocess && pip install --no-deps mmdeploy==1.3.1'


def check_mmdeploy() -> None:
    """Checks that mmdeploy is there.

    Raises:
        UserError: If not; the message says what to type.
    """
    if find_spec('mmdeploy') is None:
        raise UserError(
            f'a whole detector is exported by mmdeploy, which is not installed: {INSTALL}; '
            'or export its backbone (--backbone-only)'
        )


def check_model(model: nn.Module) -> None:
    """Checks for what a graph of standard operators does not have.

    Raises:
        UserError: If the model suppresses softly, or has masks without being a two-stage detector.
    """
    kind = (last_settings(model).get('nms') or {}).get('type', 'nms')
    if kind != 'nms':
        place = 'model.test_cfg.rcnn' if 'rcnn' in model.test_cfg else 'model.test_cfg'
        raise UserError(
            f'{place}.nms.type={kind} cannot be exported; set it to nms: '
            f'--cfg-options {place}.nms.type=nms'
        )
    if getattr(model, 'with_mask', False) and _mask_head(model) is None:
        raise UserError(
            f'{type(model).__name__}: masks of one-stage detectors cannot be exported; '
            '--backbone-only exports the backbone'
        )


def output_names(model: nn.Module) -> list[str]:
    """Names of the graph's outputs: boxes with scores, labels, and masks if it has them."""
    return ['dets', 'labels', *(['masks'] if _mask_head(model) else [])]


def last_settings(model: nn.Module) -> dict:
    """The settings of a detector's last step: score_thr, max_per_img, nms."""
    settings = getattr(model, 'test_cfg', None) or {}
    return settings.get('rcnn', settings)


def most_objects(model: nn.Module) -> int:
    """The most objects that a detector finds in a picture; `sys.maxsize` if it has no limit."""
    limit = last_settings(model).get('max_per_img', -1)
    return limit if limit > 0 else sys.maxsize


def _mask_head(model: nn.Module) -> nn.Module | None:
    """The last mask head of a two-stage detector."""
    if not getattr(getattr(model, 'roi_head', None), 'with_mask', False):
        return None
    head = model.roi_head.mask_head
    return head[-1] if isinstance(head, nn.ModuleList) else head


def to_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    """Writes a detector as an ONNX graph whose height and width are free.

    Args:
        model: In eval mode, fused; it is changed.
        example: A picture (1, 3, H, W), normalised, in which the model finds something.
        path: The file.

    Raises:
        UserError: If mmdeploy cannot write it.
    """
    names = output_names(model)
    axes = {'input': {2: 'height', 3: 'width'}, **{name: {1: 'count'} for name in names}}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        graph = Path(folder) / 'graph'
        try:
            from mmdeploy.apis.core.pipeline_manager import no_mp
            from mmdeploy.apis.onnx import export
            from mmdeploy.codebase import import_codebase
            from mmdeploy.utils import Codebase

            with quiet(logging.ERROR):
                import_codebase(Codebase.MMDET)
            follow_mmdet(BACKEND)
            with no_mp(), _old_exporter(), quiet(logging.ERROR), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # the tracer's, of every Python value
                export(
                    model,
                    example,
                    str(graph),
                    backend=BACKEND,
                    input_metas=dict(data_samples=[_sample(example)], mode='predict'),
                    context_info=dict(deploy_cfg=_deploy_config(model, names, axes)),
                    input_names=['input'],
                    output_names=names,
                    opset_version=OPSET,
                    dynamic_axes=axes,
                    keep_initializers_as_inputs=False,
                )
        except Exception as error:  # mmdeploy, mmdet and torch raise what they like
            raise UserError(
                f'mmdeploy cannot export {type(model).__name__}: '
                f'{type(error).__name__}: {reason(error)}'
            ) from error
        graph.with_suffix('.onnx').replace(path)


def find(model: nn.Module, picture: Tensor) -> tuple[Tensor, ...]:
    """What mmdet's own code finds in a picture (1, 3, H, W), normalised.

    Returns:
        Boxes (n, 4) in pixels of this picture, scores (n,), labels (n,), and masks (n, h, w) if the
        model has them: probabilities on the grid of its mask head, not pasted into the picture.
    """
    with torch.no_grad(), _unpasted_masks(model):
        (found,) = model(picture, [_sample(picture)], mode='predict')
    found = found.pred_instances
    return tuple(found[key] for key in ('bboxes', 'scores', 'labels', 'masks') if key in found)


def _sample(picture: Tensor) -> BaseDataElement:
    """What mmdet wants to know about a picture (1, 3, H, W) that was not resized."""
    from mmdet.structures import DetDataSample

    size = tuple(map(int, picture.shape[2:]))
    shapes = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    return DetDataSample(metainfo=dict(scale_factor=(1.0, 1.0), **dict.fromkeys(shapes, size)))


def _deploy_config(model: nn.Module, names: list[str], axes: dict) -> Config:
    """What is in mmdeploy's config files, which its wheel does not have."""
    return Config(
        dict(
            onnx_config=dict(
                type='onnx',
                opset_version=OPSET,
                input_names=['input'],
                output_names=names,
                input_shape=None,
                dynamic_axes=axes,
            ),
            backend_config=dict(type=BACKEND),
            codebase_config=dict(
                type='mmdet',
                task='ObjectDetection',
                model_type='end2end',
                post_processing=dict(  # the model's own settings come first
                    score_threshold=0.0,
                    iou_threshold=0.5,
                    max_output_boxes_per_class=most_objects(model),
                    pre_top_k=-1,
                    keep_top_k=-1,
                    background_label_id=-1,
                    export_postprocess_mask=False,
                ),
            ),
        )
    )


@contextmanager
def _old_exporter() -> Iterator[None]:
    """Has `torch.onnx` look as on torch 2.1, for which mmdeploy was written.

    Its default is an exporter that does not know mmdeploy's rewriting, from torch 2.9 on; what
    mmdeploy rewrites and imports is elsewhere, or gone.
    """
    changes = []
    if 'dynamo' in torch.onnx.export.__annotations__:
        tracing = functools.partial(torch.onnx.export, dynamo=False)
        changes.append((torch.onnx, 'export', tracing))
    if find_spec('torch.onnx._internal.torchscript_exporter'):
        utils = importlib.import_module('torch.onnx._internal.torchscript_exporter.utils')
        changes.append((torch.onnx, 'utils', utils))
    opset9 = importlib.import_module('torch.onnx.symbolic_opset9')
    if getattr(opset9, '_cast_Long', None) is None:
        to_long = lambda g, x, non_blocking: g.op('Cast', x, to_i=7)  # noqa: E731
        changes.append((opset9, '_cast_Long', to_long))
    before = [getattr(module, name, None) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(changes, before):
            setattr(module, name, value)


@contextmanager
def _unpasted_masks(model: nn.Module) -> Iterator[None]:
    """Has the mask head leave probabilities on its own grid, which can be compared."""
    head = _mask_head(model)
    if head is None:
        yield
        return

    def keep(
        mask_preds: list[Tensor],
        results_list: list,
        *args: object,
        activate_map: bool = False,
        **kwargs: object,
    ) -> list:
        for masks, results in zip(mask_preds, results_list, strict=True):
            masks = masks if activate_map else masks.sigmoid()
            results.masks = of_labels(masks, results.labels, head)
        return results_list

    head.predict_by_feat = keep
    try:
        yield
    finally:
        del head.predict_by_feat
