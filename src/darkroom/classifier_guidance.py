"""Classifier guidance: a second network that recognises classes in noisy latents pulls towards one of them.

Source: Song et al. 2021 (score SDE), App. I; Dhariwal & Nichol 2021, sec. 4.2. The denoiser needs no condition for it:
an unconditional model gets classes afterwards.

Shapes: B batch, C channels, H W latent size, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.denoiser import Prediction
from darkroom.diffusion.levels import NoiseLevel, add_noise
from darkroom.errors import DarkroomError

Classifier = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W) at a level, time (B,) of that level) -> logits (B, K); see `networks.classifier.NoisyClassifier`."""


@dataclass(frozen=True)
class ClassifierGuide:
    """A classifier, the index of the class that each image should show (or one for all), and how strongly.

    The classifier was trained on the latents and the noise schedule of the model that it guides.
    """

    classifier: Classifier
    labels: int | Sequence[int]
    scale: float = 1.0

    def labels_of(self, count: int) -> list[int]:
        """The label of each of `count` images."""
        labels = [self.labels] if isinstance(self.labels, int) else list(self.labels)
        if len(labels) not in (1, count):
            raise DarkroomError(
                f"{len(labels)} labels of the classifier for {count} images: give one for all or one for each"
            )
        return labels * count if len(labels) == 1 else labels


def class_log_probability(classifier: Classifier, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
    """(B,): log p(label | x_t)."""
    logits = classifier(x, time)
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DarkroomError(
            f"label {int(labels.max())} is not one of the classifier's {logits.shape[1]} classes, 0 to "
            f"{logits.shape[1] - 1}"
        )
    return F.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]


def classifier_loss(classifier: Classifier, x0: Tensor, noise: Tensor, level: NoiseLevel, labels: Tensor) -> Tensor:
    """(B,): -log p(label | x_t), the training loss. x0, noise (B, C, H, W); level and labels (B,)."""
    x = add_noise(x0, noise, level)
    return -class_log_probability(classifier, x, level.time.to(x), labels)


class ClassifierGuided:
    """(x, level) -> x0 of any `denoise`, moved up the gradient of the classifier.

    epsilon' = epsilon - sigma * scale * grad_x log p(y | x); Dhariwal & Nichol 2021, alg. 2, where sigma is
    sqrt(1 - alphas_cumprod). As x = alpha*x0 + sigma*epsilon this is x0' = x0 + (sigma^2 / alpha) * scale * grad, which
    holds for every schedule. With scale 1 and a perfect classifier the result is E[x0 | x, y].

    nfe: network evaluations per image so far, one of the classifier counted as one.
    """

    def __init__(
        self,
        denoise: Callable[[Tensor, NoiseLevel], Tensor],
        classifier: Classifier,
        labels: Sequence[int],
        scale: float = 1.0,
    ) -> None:
        """labels: one per image of the batch."""
        self.denoise = denoise
        self.classifier = classifier
        self.labels = torch.tensor(list(labels))
        self.scale = float(scale)
        self._calls = 0

    @property
    def nfe(self) -> int:
        return self._calls + int(getattr(self.denoise, "nfe", 0))

    def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return self.denoise(x, level) + self._pull(x, level)

    def predict(self, x: Tensor, level: NoiseLevel) -> Prediction:
        """For solvers that ask for more than x0: the raw output and a learned variance stay those of the network."""
        inner: Any = self.denoise
        prediction: Prediction = inner.predict(x, level)
        return replace(prediction, x0=prediction.x0 + self._pull(x, level))

    def _pull(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """(B, C, H, W): what is added to x0 at a scalar level."""
        alpha, sigma = float(level.alpha), float(level.sigma)
        # Pure noise tells nothing of a class: the gradient is 0 there, and its factor infinite.
        if alpha == 0 or self.scale == 0:
            return torch.zeros_like(x)
        time = level.time.to(x).expand(x.shape[0])
        self._calls += 1
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            total = class_log_probability(self.classifier, leaf, time, self.labels.to(x.device)).sum()
            (gradient,) = torch.autograd.grad(total, leaf)
        return (sigma**2 / alpha * self.scale) * gradient
