"""A whole detector of mmdet as one ONNX graph of standard operators, written by mmdeploy.

mmdeploy simplifies two-stage detectors, so that its graph finds other boxes than mmdet: it
suppresses proposals of all levels of the pyramid together, keeps one box of a proposal for all
classes, and averages the mask heads of a cascade before the sigmoid; cascades whose classes have
boxes of their own, as ours, it refuses. `_follow_mmdet` registers with it what mmdet does.
"""

import functools
import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

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
    from mmdeploy.apis.core.pipeline_manager import no_mp
    from mmdeploy.apis.onnx import export
    from mmdeploy.codebase import import_codebase
    from mmdeploy.utils import Codebase

    with quiet(logging.ERROR):
        import_codebase(Codebase.MMDET)
    _follow_mmdet()
    names = output_names(model)
    axes = {'input': {2: 'height', 3: 'width'}, **{name: {1: 'count'} for name in names}}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        graph = Path(folder) / 'graph'
        try:
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


def _sample(picture: Tensor):
    """What mmdet wants to know about a picture (1, 3, H, W) that was not resized."""
    from mmdet.structures import DetDataSample

    size = tuple(map(int, picture.shape[2:]))
    shapes = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    return DetDataSample(metainfo=dict(scale_factor=(1.0, 1.0), **dict.fromkeys(shapes, size)))


def _deploy_config(model: nn.Module, names: list[str], axes: dict) -> dict:
    """What is in mmdeploy's config files, which its wheel does not have."""
    from mmengine.config import Config

    limit = last_settings(model).get('max_per_img', 100)
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
                    max_output_boxes_per_class=limit,
                    pre_top_k=-1,
                    keep_top_k=limit,
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

    def keep(mask_preds, results_list, *args, activate_map: bool = False, **kwargs):
        for masks, results in zip(mask_preds, results_list, strict=True):
            masks = masks if activate_map else masks.sigmoid()
            results.masks = _of_labels(masks, results.labels, head)
        return results_list

    head.predict_by_feat = keep
    try:
        yield
    finally:
        del head.predict_by_feat


def _of_labels(masks: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Of masks (n, classes, h, w) those of the labels (n,), as (n, h, w)."""
    if head.class_agnostic:
        return masks[:, 0]
    return masks[torch.arange(masks.shape[0], device=masks.device), labels]


@functools.cache
def _follow_mmdet() -> None:
    """Registers with mmdeploy what it otherwise computes in another way than mmdet.

    The functions take the place of methods while mmdeploy traces a model. Pictures come one by one.
    """
    from mmdeploy.core import FUNCTION_REWRITER

    for method, function in (
        ('dense_heads.rpn_head.RPNHead.predict_by_feat', _proposals),
        ('roi_heads.bbox_heads.bbox_head.BBoxHead.predict_by_feat', _boxes),
        ('roi_heads.cascade_roi_head.CascadeRoIHead.predict_bbox', _cascade_boxes),
        ('roi_heads.cascade_roi_head.CascadeRoIHead.predict_mask', _cascade_masks),
    ):
        FUNCTION_REWRITER.register_rewriter(f'mmdet.models.{method}', backend=BACKEND)(function)


def _proposals(
    self, cls_scores, bbox_preds, score_factors=None, batch_img_metas=None, cfg=None, **kwargs
):
    """`RPNHead.predict_by_feat`: suppresses proposals of each level of the pyramid by themselves.

    Returns:
        Boxes with scores (1, n, 5), and zeros (1, n).
    """
    from mmdet.structures.bbox import get_box_tensor

    cfg = cfg or self.test_cfg
    shape = batch_img_metas[0]['img_shape']
    boxes, scores, levels = [], [], []
    for level, (logits, deltas) in enumerate(zip(cls_scores, bbox_preds)):
        anchors = get_box_tensor(
            self.prior_generator.single_level_grid_priors(
                logits.shape[-2:], level, device=logits.device
            )
        )
        logits = logits.permute(0, 2, 3, 1)
        if self.use_sigmoid_cls:
            objectness = logits.reshape(1, -1).sigmoid()
        else:
            objectness = logits.reshape(1, -1, 2).softmax(-1)[..., 0]
        best, first = objectness.topk(cfg.nms_pre)
        deltas = deltas.permute(0, 2, 3, 1).reshape(1, -1, 4)[:, first[0]]
        decoded = get_box_tensor(
            self.bbox_coder.decode(anchors[first[0]][None], deltas, max_shape=shape)
        )
        sides = decoded[..., 2:] - decoded[..., :2]
        large = (sides > cfg.get('min_bbox_size', -1)).all(-1)
        boxes.append(decoded)
        scores.append(torch.where(large, best, torch.zeros_like(best)))
        levels.append(torch.full_like(first, level))
    dets, levels = _suppress(
        *(torch.cat(parts, 1) for parts in (boxes, scores, levels)),
        iou_threshold=cfg.nms.iou_threshold,
        score_threshold=0.0,
        limit=cfg.max_per_img,
    )
    return dets, torch.zeros_like(levels)


def _boxes(self, rois, cls_scores, bbox_preds, batch_img_metas, rcnn_test_cfg=None, rescale=False):
    """`BBoxHead.predict_by_feat`: each class has boxes of its own.

    `rois` are (1, n, 5) with the number of the picture first, `cls_scores` (1, n, classes + 1), and
    `bbox_preds` (1, n, classes · 4), or (1, n, 4) for all classes.

    Returns:
        Boxes with scores (1, m, 5), and labels (1, m).
    """
    from mmdet.structures.bbox import get_box_tensor

    custom = self.custom_cls_channels
    scores = self.loss_cls.get_activation(cls_scores) if custom else cls_scores.softmax(-1)
    scores = scores[..., : self.num_classes]
    shape = batch_img_metas[0]['img_shape']
    boxes = get_box_tensor(self.bbox_coder.decode(rois[..., 1:], bbox_preds, max_shape=shape))
    boxes = boxes.reshape(1, scores.shape[1], -1, 4).expand(-1, -1, self.num_classes, -1)
    labels = torch.arange(self.num_classes, device=scores.device).expand(scores.shape)
    return _suppress(
        boxes.reshape(1, -1, 4),
        scores.reshape(1, -1),
        labels.reshape(1, -1),
        iou_threshold=rcnn_test_cfg.nms.iou_threshold,
        score_threshold=rcnn_test_cfg.score_thr,
        limit=rcnn_test_cfg.max_per_img,
    )


def _cascade_boxes(self, x, batch_img_metas, rpn_results_list, rcnn_test_cfg, rescale=False):
    """`CascadeRoIHead.predict_bbox`: between stages, a box is refined as its best class wants it.

    Returns:
        Boxes with scores (1, m, 5), and labels (1, m).
    """
    from mmdet.structures.bbox import get_box_tensor

    rois, logits = _rois(rpn_results_list[0]), 0
    for i, head in enumerate(self.bbox_head):
        results = self._bbox_forward(i, x, rois)
        deltas = results['bbox_pred']
        logits = logits + results['cls_score'] / self.num_stages
        if i < self.num_stages - 1:
            if not head.reg_class_agnostic:
                best = results['cls_score'][:, :-1].argmax(1)
                each = torch.arange(rois.shape[0], device=rois.device)
                deltas = deltas.reshape(-1, head.num_classes, 4)[each, best]
            refined = head.bbox_coder.decode(
                rois[None, :, 1:], deltas[None], max_shape=batch_img_metas[0]['img_shape']
            )
            rois = torch.cat([rois[:, :1], get_box_tensor(refined)[0]], 1)
    return self.bbox_head[-1].predict_by_feat(
        rois=rois[None],
        cls_scores=logits[None],
        bbox_preds=deltas[None],
        batch_img_metas=batch_img_metas,
        rcnn_test_cfg=rcnn_test_cfg,
    )


def _cascade_masks(self, x, batch_img_metas, results_list, rescale=False):
    """`CascadeRoIHead.predict_mask`: the mean of the heads' probabilities, not of their logits.

    Returns:
        Boxes with scores (1, n, 5), labels (1, n), and masks (1, n, h, w).
    """
    dets, labels = results_list
    rois = _rois(dets)
    stages = range(self.num_stages)
    masks = sum(self._mask_forward(i, x, rois)['mask_preds'].sigmoid() for i in stages)
    return dets, labels, _of_labels(masks / self.num_stages, labels[0], self.mask_head[-1])[None]


def _rois(dets: Tensor) -> Tensor:
    """Boxes (1, n, 5) with scores as (n, 5) with the number of the picture, which is 0."""
    return torch.cat([torch.zeros_like(dets[0, :, :1]), dets[0, :, :4]], 1)


def _suppress(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    iou_threshold: float,
    score_threshold: float,
    limit: int,
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression within groups, as `batched_nms` of mmcv: groups are moved apart.

    Args:
        boxes: (1, n, 4)
        scores: (1, n)
        groups: (1, n), integers.
        iou_threshold: Boxes that overlap a better one by more go.
        score_threshold: Boxes of a score not above it go.
        limit: The most boxes that stay.

    Returns:
        Boxes with scores (1, m, 5), the best first, and their groups (1, m). If fewer than `limit`
        stay, a box of zeros comes last.
    """
    from mmdeploy.mmcv.ops import multiclass_nms

    apart = boxes + (groups * (boxes.max() + 1))[..., None]
    dets, _, index = multiclass_nms(
        apart,
        scores[..., None],
        limit,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
        keep_top_k=limit,
        output_index=True,
    )
    # Where a box of zeros fills up, its index is -1, which ONNX does not count from the end.
    boxes = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)[:, index[0] + 1]
    groups = torch.cat([torch.zeros_like(groups[:, :1]), groups], 1)[:, index[0] + 1]
    return torch.cat([boxes, dets[..., 4:]], 2), groups
