"""Losses by which a student learns from the logits of a teacher."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmslak.registry import MODELS


@MODELS.register_module()
class NKD(nn.Module):
    """Distillation of the target class and of all others, each normalised by itself.

    With student s, teacher t and target class y it is
    −t_y·log s_y − α·T²·Σ_{i≠y} n(t)_i·log n(s)_i, where n is a softmax at temperature T without
    class y. The first term takes the place of the cross-entropy. Source: Rethinking Knowledge
    Distillation via Cross-Entropy (arXiv 2208.10139); form and defaults are of the code of Are
    Large Kernels Better Teachers than Transformers for ConvNets? (ICML 2023, arXiv 2305.19412).

    Args:
        temperature: T.
        alpha: α, the weight of the second term.
    """

    def __init__(self, temperature: float = 1.0, alpha: float = 1.0) -> None:
        super().__init__()
        self.temperature, self.alpha = temperature, alpha

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Computes the mean over the pictures.

        Args:
            student: Logits (N, C).
            teacher: Logits (N, C).
            target: Classes (N,), or scores (N, C) as Mixup makes them, of which the largest counts.

        Returns:
            A scalar, in float32 at least.
        """
        student, teacher = _at_least_float32(student), _at_least_float32(teacher)
        target = (target.argmax(1) if target.dim() > 1 else target)[:, None]
        of_target = -teacher.softmax(1).gather(1, target) * student.log_softmax(1).gather(1, target)
        # By their places, not by a mask, for whose size the host would wait for a GPU.
        others = torch.arange(student.shape[1] - 1, device=student.device)
        others = others + (others >= target)
        student, teacher = (
            logits.gather(1, others) / self.temperature for logits in (student, teacher)
        )
        of_others = -(teacher.softmax(1) * student.log_softmax(1)).sum(1)
        return of_target.mean() + self.alpha * self.temperature**2 * of_others.mean()


@MODELS.register_module()
class KD(nn.Module):
    """Distillation of all classes together.

    Soft, it is α·T²·KL(teacher ‖ student) + (1 − α)·cross-entropy, with both softmaxes of the first
    term at temperature T. Hard, it is the mean of the cross-entropy with the labels and of the one
    with the teacher's best class. Source: Distilling the Knowledge in a Neural Network (arXiv
    1503.02531); form and defaults are of SLaK's official code.

    Args:
        temperature: T of the soft form.
        alpha: α of the soft form.
        hard: Take the hard form.
        label_smoothing: Of the cross-entropy with the labels; the official Mixup smooths by 0.1.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        alpha: float = 0.1,
        hard: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.temperature, self.alpha, self.hard = temperature, alpha, hard
        self.label_smoothing = label_smoothing

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Computes the mean over the pictures.

        Args:
            student: Logits (N, C).
            teacher: Logits (N, C).
            target: Classes (N,), or scores (N, C) as Mixup makes them.

        Returns:
            A scalar, in float32 at least.
        """
        student, teacher = _at_least_float32(student), _at_least_float32(teacher)
        if target.is_floating_point():
            target = target.to(student.dtype)
        of_labels = functional.cross_entropy(student, target, label_smoothing=self.label_smoothing)
        if self.hard:
            return (of_labels + functional.cross_entropy(student, teacher.argmax(1))) / 2
        divergence = _divergence(student, teacher, self.temperature, dim=1).mean()
        return self.alpha * divergence + (1 - self.alpha) * of_labels


@MODELS.register_module()
class CWD(nn.Module):
    """Channel-wise distillation: where in the picture does each class lie?

    The softmax of each channel runs over positions. The loss is w·T²·KL(teacher ‖ student), summed
    over positions and averaged over channels and pictures. Channel-wise Knowledge Distillation for
    Dense Prediction (ICCV 2021, arXiv 2011.13256), with its defaults for logits.

    Args:
        temperature: T.
        weight: w.
    """

    def __init__(self, temperature: float = 4.0, weight: float = 3.0) -> None:
        super().__init__()
        self.temperature, self.weight = temperature, weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            student: Logits (N, C, H, W).
            teacher: Logits (N, C, H', W'), resized to the student's size where it differs.

        Returns:
            A scalar, in float32 at least.
        """
        student, teacher = _at_least_float32(student), _at_least_float32(teacher)
        if teacher.shape[2:] != student.shape[2:]:
            teacher = functional.interpolate(
                teacher, student.shape[2:], mode='bilinear', align_corners=False
            )
        student, teacher = student.flatten(2), teacher.flatten(2)
        return self.weight * _divergence(student, teacher, self.temperature, dim=2).mean()


def _divergence(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    """T²·KL(teacher ‖ student) of softmaxes at a temperature along one dimension."""
    student, teacher = ((logits / temperature).log_softmax(dim) for logits in (student, teacher))
    divergence = functional.kl_div(student, teacher, reduction='none', log_target=True)
    return temperature**2 * divergence.sum(dim)


def _at_least_float32(logits: Tensor) -> Tensor:
    """Logits of mixed precision in float32: sums over classes or positions need it."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
