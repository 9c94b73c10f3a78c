"""Steps of detectors as mmdet computes them, for mmdeploy to trace.

mmdeploy simplifies them, so that its graph finds other boxes than mmdet. Of two-stage detectors it
suppresses proposals of all levels of the pyramid together, keeps one box of a proposal for all
classes, and averages the mask heads of a cascade before the sigmoid; cascades whose classes have
boxes of their own, as ours, it refuses. Of one-stage detectors it keeps the best anchors with all
their classes, and not the best pairs of anchor and class; compares scores with the threshold after
they are multiplied by centerness; and has YOLOX find one box in several classes.

The functions below take the place of mmdet's while mmdeploy traces a model. Pictures come one by
one. Nothing is removed that depends on values, which a trace could not follow: scores become 0.
"""

import functools
import sys
from collections.abc import Sequence

import torch
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn


@functools.cache
def follow_mmdet(backend: str) -> None:
    """Registers the steps with mmdeploy, for one of its backends."""
    from mmdeploy.core import FUNCTION_REWRITER

    for name, function in (
        ('utils.misc.filter_scores_and_topk', _best_pairs),
        ('dense_heads.base_dense_head.BaseDenseHead.predict_by_feat', _boxes_of_dense_head),
        ('dense_heads.gfl_head.GFLHead.predict_by_feat', _boxes_of_dense_head),
        ('dense_heads.rtmdet_head.RTMDetHead.predict_by_feat', _boxes_of_dense_head),
        ('dense_heads.base_dense_head.BaseDenseHead._bbox_post_process', _suppress_by_class),
        ('task_modules.coders.delta_xywh_bbox_coder.DeltaXYWHBBoxCoder.decode', _decoded),
        ('dense_heads.rpn_head.RPNHead.predict_by_feat', _proposals),
        ('dense_heads.yolox_head.YOLOXHead.predict_by_feat', _boxes_of_yolox),
        ('roi_heads.bbox_heads.bbox_head.BBoxHead.predict_by_feat', _boxes),
        ('roi_heads.cascade_roi_head.CascadeRoIHead.predict_bbox', _cascade_boxes),
        ('roi_heads.cascade_roi_head.CascadeRoIHead.predict_mask', _cascade_masks),
    ):
        FUNCTION_REWRITER.register_rewriter(f'mmdet.models.{name}', backend=backend)(function)


def _proposals(
    self: nn.Module,
    cls_scores: list[Tensor],
    bbox_preds: list[Tensor],
    score_factors: None = None,
    batch_img_metas: list[dict] | None = None,
    cfg: ConfigDict | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
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


def _best_pairs(
    scores: Tensor, score_thr: float, topk: int, results: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """`filter_scores_and_topk`: the best pairs of anchor and class of a level.

    Args:
        scores: (n, classes)
        score_thr: Scores not above it become 0.
        topk: The most pairs; all with -1.
        results: What else the anchors have, each (n, …).

    Returns:
        Scores, classes and anchors of the pairs, and what else the anchors have.
    """
    best = torch.where(scores > score_thr, scores, torch.zeros_like(scores)).flatten()
    pairs = torch.arange(best.shape[0], device=best.device)
    if topk > 0:
        best, pairs = best.topk(topk)
    anchors = torch.div(pairs, scores.shape[1], rounding_mode='floor')
    found = {name: value[anchors] for name, value in (results or {}).items()}
    return best, pairs - anchors * scores.shape[1], anchors, found


def _boxes_of_dense_head(
    self: nn.Module,
    cls_scores: list[Tensor],
    bbox_preds: list[Tensor],
    score_factors: list[Tensor] | None = None,
    batch_img_metas: list[dict] | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """`BaseDenseHead.predict_by_feat`: mmdet's own, of one picture, with the steps given here.

    Returns:
        Boxes with scores (1, n, 5), and labels (1, n).
    """
    priors = self.prior_generator.grid_priors(
        [level.shape[2:] for level in cls_scores],
        dtype=cls_scores[0].dtype,
        device=cls_scores[0].device,
    )
    return self._predict_by_feat_single(
        cls_score_list=[level[0] for level in cls_scores],
        bbox_pred_list=[level[0] for level in bbox_preds],
        score_factor_list=[level[0] for level in score_factors or []] or [None] * len(priors),
        mlvl_priors=priors,
        img_meta=batch_img_metas[0],
        cfg=self.test_cfg,
    )


def _decoded(
    self: object, bboxes: Tensor, pred_bboxes: Tensor, max_shape: Sequence[Tensor] | None = None
) -> Tensor:
    """`DeltaXYWHBBoxCoder.decode`: of boxes (n, 4), too; mmdeploy's takes (1, n, 4) alone."""
    from mmdet.models.task_modules.coders import delta_xywh_bbox_coder as mmdet

    if pred_bboxes.dim() == 2:
        return _decoded(self, bboxes[None], pred_bboxes[None], max_shape)[0]
    return mmdet.delta2bbox(
        bboxes,
        pred_bboxes,
        self.means,
        self.stds,
        max_shape,
        clip_border=self.clip_border,
        add_ctr_clamp=self.add_ctr_clamp,
        ctr_clamp=self.ctr_clamp,
    )


def _suppress_by_class(
    self: nn.Module, results: InstanceData, cfg: ConfigDict, **kwargs: object
) -> tuple[Tensor, Tensor]:
    """`BaseDenseHead._bbox_post_process`.

    Returns:
        Boxes with scores (1, n, 5), and labels (1, n).
    """
    from mmdet.structures.bbox import get_box_tensor

    boxes, scores = get_box_tensor(results.bboxes), results.scores
    if 'score_factors' in results:
        scores = scores * results.score_factors
    if cfg.get('min_bbox_size', -1) >= 0:
        large = (boxes[:, 2:] - boxes[:, :2] > cfg.min_bbox_size).all(1)
        scores = torch.where(large, scores, torch.zeros_like(scores))
    return _suppress(
        *(part[None] for part in (boxes, scores, results.labels)),
        iou_threshold=cfg.nms.iou_threshold,
        score_threshold=0.0,
        limit=cfg.get('max_per_img', -1),
    )


def _boxes_of_yolox(
    self: nn.Module,
    cls_scores: list[Tensor],
    bbox_preds: list[Tensor],
    objectnesses: list[Tensor],
    batch_img_metas: list[dict] | None = None,
    cfg: ConfigDict | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """`YOLOXHead.predict_by_feat`: each box has its best class alone.

    Returns:
        Boxes with scores (1, n, 5), and labels (1, n).
    """
    cfg = cfg or self.test_cfg
    priors = self.prior_generator.grid_priors(
        [level.shape[2:] for level in cls_scores], device=cls_scores[0].device, with_stride=True
    )
    classes, deltas, objects = (
        torch.cat([level.permute(0, 2, 3, 1).reshape(1, -1, level.shape[1]) for level in levels], 1)
        for levels in (cls_scores, bbox_preds, objectnesses)
    )
    scores, labels = classes.sigmoid().max(2)
    return _suppress(
        self._bbox_decode(torch.cat(priors), deltas),
        scores * objects[..., 0].sigmoid(),
        labels,
        iou_threshold=cfg.nms.iou_threshold,
        score_threshold=cfg.score_thr,
        limit=cfg.get('max_per_img', -1),
    )


def _boxes(
    self: nn.Module,
    rois: Tensor,
    cls_scores: Tensor,
    bbox_preds: Tensor,
    batch_img_metas: list[dict],
    rcnn_test_cfg: ConfigDict,
    rescale: bool = False,
) -> tuple[Tensor, Tensor]:
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


def _cascade_boxes(
    self: nn.Module,
    x: tuple[Tensor, ...],
    batch_img_metas: list[dict],
    rpn_results_list: tuple[Tensor, Tensor],
    rcnn_test_cfg: ConfigDict,
    rescale: bool = False,
) -> tuple[Tensor, Tensor]:
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


def _cascade_masks(
    self: nn.Module,
    x: tuple[Tensor, ...],
    batch_img_metas: list[dict],
    results_list: tuple[Tensor, Tensor],
    rescale: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`CascadeRoIHead.predict_mask`: the mean of the heads' probabilities, not of their logits.

    Returns:
        Boxes with scores (1, n, 5), labels (1, n), and masks (1, n, h, w).
    """
    dets, labels = results_list
    rois = _rois(dets)
    stages = range(self.num_stages)
    masks = sum(self._mask_forward(i, x, rois)['mask_preds'].sigmoid() for i in stages)
    return dets, labels, of_labels(masks / self.num_stages, labels[0], self.mask_head[-1])[None]


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
        limit: The most boxes that stay; all with -1.

    Returns:
        Boxes with scores (1, m, 5), the best first, and their groups (1, m). If fewer than `limit`
        stay, a box of zeros comes last.
    """
    from mmdeploy.mmcv.ops import multiclass_nms

    apart = boxes + (groups * (boxes.max() + 1))[..., None]
    dets, _, index = multiclass_nms(
        apart,
        scores[..., None],
        limit if limit > 0 else sys.maxsize,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
        keep_top_k=limit,
        output_index=True,
    )
    # Where a box of zeros fills up, its index is -1, which ONNX does not count from the end.
    boxes = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)[:, index[0] + 1]
    groups = torch.cat([torch.zeros_like(groups[:, :1]), groups], 1)[:, index[0] + 1]
    return torch.cat([boxes, dets[..., 4:]], 2), groups


def of_labels(masks: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Of masks (n, classes, h, w) those of the labels (n,), as (n, h, w)."""
    if head.class_agnostic:
        return masks[:, 0]
    return masks[torch.arange(masks.shape[0], device=masks.device), labels]
