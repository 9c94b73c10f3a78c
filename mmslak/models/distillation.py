"""Models that learn from a frozen teacher, and are their student in everything else."""

from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn

from mmslak.models.teacher import Teacher, model_config
from mmslak.registry import MODELS

# Settings of a preprocessor that decide what numbers a model sees for a picture.
INPUTS = ('mean', 'std', 'to_rgb', 'bgr_to_rgb', 'rgb_to_bgr')


@MODELS.register_module('DistilledClassifier')
def distilled_classifier(
    student: dict | str,
    teacher: dict | str,
    teacher_checkpoint: str | Path,
    loss: dict | None = None,
    data_preprocessor: dict | None = None,
) -> nn.Module:
    """Builds a classifier of mmpretrain that learns from another one.

    The result is the student with another loss: it is trained, saved and tested like any model, and
    its checkpoints are the student's. The teacher sees the same pictures, in eval mode. It costs no
    optimizer state, no gradient, no averaged weights and no bytes of a checkpoint.

    Args:
        student: Config of the student, or a config file, such as 'mmslak::slak_t_imagenet'.
        teacher: Config of the teacher, or a config file.
        teacher_checkpoint: File with all weights of the teacher, or its address.
        loss: `mmslak.NKD` (the default), `mmslak.KD`, or another one of the same arguments. It
            takes the place of the loss of the student's head.
        data_preprocessor: The student's, unless its own config has one.

    Raises:
        ValueError: If the two normalise pictures differently.
        TypeError: If the student's head computes its loss otherwise than mmpretrain's `ClsHead`.
    """
    loss = loss or dict(type='mmslak.NKD')
    return _distilled(_Classifier, student, teacher, teacher_checkpoint, loss, data_preprocessor)


@MODELS.register_module('DistilledSegmentor')
def distilled_segmentor(
    student: dict | str,
    teacher: dict | str,
    teacher_checkpoint: str | Path,
    loss: dict | None = None,
    data_preprocessor: dict | None = None,
) -> nn.Module:
    """Builds an EncoderDecoder of mmseg that learns from another segmentor.

    As `distilled_classifier`, with the student's own losses and that of distillation, between the
    logits of both decode heads.

    Args:
        student: Config of the student, or a config file.
        teacher: Config of the teacher, or a config file, such as 'mmslak::upernet_slak_t_ade20k'.
        teacher_checkpoint: File with all weights of the teacher, or its address.
        loss: `mmslak.CWD` (the default), or another one of the same arguments.
        data_preprocessor: The student's, unless its own config has one.

    Raises:
        ValueError: If the two normalise pictures differently.
        TypeError: If the student computes its losses otherwise than an EncoderDecoder does.
    """
    loss = loss or dict(type='mmslak.CWD')
    return _distilled(_Segmentor, student, teacher, teacher_checkpoint, loss, data_preprocessor)


def _distilled(
    kind: type,
    student: dict | str,
    teacher: dict | str,
    checkpoint: str | Path,
    loss: dict,
    data_preprocessor: dict | None,
) -> nn.Module:
    config = model_config(student)
    if data_preprocessor is not None:
        config.setdefault('data_preprocessor', data_preprocessor)
    model = MMENGINE_MODELS.build(config)
    kind.check_student(model)
    before = type(model)
    # Of a class that is the student's own with another loss: all else that asks for names of
    # parameters, parts or methods finds the student's.
    model.__class__ = type(f'Distilled{before.__name__}', (kind, before), {})
    model.teacher = Teacher(teacher, checkpoint)
    model.distillation_loss = MODELS.build(loss)
    _check_inputs(config, model.teacher.config)
    return model


def _check_inputs(student: dict, teacher: dict) -> None:
    """Raises ValueError if two configs normalise pictures differently."""
    ours, theirs = (config.get('data_preprocessor') or {} for config in (student, teacher))
    for key in INPUTS if ours and theirs else ():
        pair = ours.get(key), theirs.get(key)
        if _numbers(pair[0]) != _numbers(pair[1]):
            raise ValueError(
                'student and teacher see the same numbers, but their data_preprocessors have '
                f'{key}={pair[0]} and {key}={pair[1]}'
            )


def _numbers(setting: Sequence[float] | bool | None) -> list[float] | bool:
    """A setting in one form: a tuple is the same as a list, and None the same as False."""
    return [float(v) for v in setting] if isinstance(setting, Sequence) else bool(setting)


class _Distilled(nn.Module):
    """What a student's class gets before its own methods."""

    teacher: Teacher
    distillation_loss: nn.Module

    @staticmethod
    def check_student(student: nn.Module) -> None:
        """Raises TypeError if `loss` cannot take the place of the student's own."""

    def init_weights(self) -> None:
        """Initialises the student, and loads the teacher before training begins."""
        super().init_weights()
        self.teacher.load()

    def distill(self, inputs: Tensor, logits: Tensor, *target: Tensor) -> Tensor:
        """The loss of distillation for a batch and the student's logits of it."""
        theirs = self.teacher(inputs)
        if not isinstance(logits, Tensor) or logits.shape[:2] != theirs.shape[:2]:
            shapes = [tuple(getattr(one, 'shape', ())) for one in (logits, theirs)]
            raise ValueError(
                'expected logits of the same classes from student and teacher, got '
                f'{shapes[0]} and {shapes[1]}'
            )
        return self.distillation_loss(logits, theirs, *target)


class _Classifier(_Distilled):
    @staticmethod
    def check_student(student: nn.Module) -> None:
        from mmpretrain.models.heads import ClsHead

        # Such as a head with margins, or for several labels. Models of timm have no head at all.
        head = type(getattr(student, 'head', None) or ClsHead())
        names = 'loss', '_get_loss'
        if any(getattr(head, name, None) is not getattr(ClsHead, name) for name in names):
            raise TypeError(
                f'DistilledClassifier: {head.__name__} computes its loss otherwise than ClsHead of '
                'mmpretrain does, such as LinearClsHead'
            )

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        logits = self.forward(inputs, mode='tensor')
        if 'gt_score' in data_samples[0]:  # of Mixup and CutMix
            target = torch.stack([sample.gt_score for sample in data_samples])
        else:
            target = torch.cat([sample.gt_label for sample in data_samples])
        return dict(loss=self.distill(inputs, logits, target))


class _Segmentor(_Distilled):
    @staticmethod
    def check_student(student: nn.Module) -> None:
        from mmseg.models.decode_heads.decode_head import BaseDecodeHead
        from mmseg.models.segmentors import EncoderDecoder

        head = getattr(student, 'decode_head', None)
        for part, expected in ((type(student), EncoderDecoder), (type(head), BaseDecodeHead)):
            if getattr(part, 'loss', None) is not expected.loss:
                raise TypeError(
                    f'DistilledSegmentor: {part.__name__} computes its losses otherwise than '
                    f'{expected.__name__} of mmseg does'
                )

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        features = self.extract_feat(inputs)
        logits = self.decode_head(features)
        losses = self.decode_head.loss_by_feat(logits, data_samples)
        losses = {f'decode.{name}': value for name, value in losses.items()}
        if self.with_auxiliary_head:
            losses.update(self._auxiliary_head_forward_train(features, data_samples))
        losses['loss_distillation'] = self.distill(inputs, logits)
        return losses
