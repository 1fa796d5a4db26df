"""What the comparison of adapters is made of: its methods, its size, and what a method gave."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

NAMES = {
    "full": "full fine-tuning",
    "probe": "linear probe",
    "hta": "HTA",
    "hra": "HRA",
    "two-sided": "two-sided (HOFT)",
    "lora": "LoRA (peft)",
}


@dataclass(frozen=True)
class Variant:
    """A method with its size.

    Attributes:
        kind: as in `householder.train.adapt.make_method`.
        size: reflectors or rank.
    """

    kind: str
    size: int = 0

    @property
    def name(self) -> str:
        letter = {"hra": "N", "two-sided": "N", "hta": "D′", "lora": "r"}.get(self.kind)
        return NAMES[self.kind] + (f", {letter} = {self.size}" if letter else "")


VARIANTS = (
    Variant("probe"),
    *(Variant("hra", n) for n in (2, 4, 8)),
    *(Variant("two-sided", n) for n in (2, 4)),
    *(Variant("hta", r) for r in (0, 1, 4)),
    *(Variant("lora", r) for r in (1, 2, 4)),
    Variant("full"),
)


@dataclass(frozen=True)
class Settings:
    """The size of the experiment.

    Attributes:
        images: a folder with one folder of images per class; scikit-learn's digits if None.
        image_size: to which images of a folder are resized.
        shots: images per class to adapt on, and as many to choose the learning rate on.
        pretrain_steps: of the base model.
        steps: of each adaptation.
        batch_size: images per step.
        learning_rates: among which each method chooses.
        seeds: adaptations of each method, each with other images and other first weights.
        device: where to run.
    """

    images: str | None = None
    image_size: int = 32
    shots: int = 20
    pretrain_steps: int = 600
    steps: int = 200
    batch_size: int = 50
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    seeds: int = 5
    device: str = "cpu"


@dataclass(frozen=True)
class Outcome:
    """One method's result.

    Attributes:
        kind: the method.
        size: reflectors or rank.
        num_parameters: numbers trained, the new head's among them.
        head_parameters: of these, the head's.
        accuracies: on the test images, by seed.
        learning_rate: the chosen one.
        step_seconds: median time of a training step.
        step_bytes: kept by a step for its backward pass, plus gradients and the optimizer's state.
    """

    kind: str
    size: int
    num_parameters: int
    head_parameters: int
    accuracies: tuple[float, ...]
    learning_rate: float
    step_seconds: float
    step_bytes: int

    @property
    def variant(self) -> Variant:
        return Variant(self.kind, self.size)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0
