"""What an evaluation found out, as ``probe.json`` holds it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr.beton import Facts
from simclr.config import ProbeConfig, TrainConfig
from simclr.evaluation import Candidate, Curve


@dataclass(frozen=True)
class Scores:
    """What a classifier reaches: accuracy in percent and mean cross-entropy in nats."""

    train: float
    validation: float
    """Of a classifier that was not fitted on the validation images."""
    test: float
    train_loss: float
    validation_loss: float
    test_loss: float
    chosen: Candidate

    @staticmethod
    def after_last_epoch(curves: Mapping[str, Curve], chosen: Candidate) -> Scores:
        """Return the ends of the curves of train, validation and test, g = 1."""
        accuracy = {name: float(curve.accuracy[-1, 0]) for name, curve in curves.items()}
        loss = {f"{name}_loss": float(curve.loss[-1, 0]) for name, curve in curves.items()}
        return Scores(**accuracy, **loss, chosen=chosen)


@dataclass(frozen=True)
class Row:
    """One representation, measured. Accuracies in percent."""

    name: str
    width: int
    knn_validation: float
    knn_test: float
    classifier: Scores | None
    seconds: float
    image_size: int | None = None
    """Side in pixels at which images were read; None: not known, as in earlier versions."""


@dataclass(frozen=True)
class Trial:
    """One candidate, measured on the validation images after the last epoch."""

    candidate: Candidate
    accuracy: float
    loss: float


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Everything that an evaluation found out."""

    config: ProbeConfig
    environment: Mapping[str, Any]
    checkpoint: Path
    pretraining: TrainConfig
    pretraining_step: int
    pretraining_epoch: int
    pretraining_knn: float | None
    pretraining_manifest: Mapping[str, Any] | None
    """The run folder's manifest.json; None if the checkpoint lies elsewhere."""
    pretraining_facts: Facts
    train_path: Path
    test_path: Path
    train_facts: Facts
    test_facts: Facts
    num_fit: int
    """Images of the training file that candidates were fitted on."""
    num_labelled: int
    """Images of the training file whose labels were used: those, and the validation images."""
    rows: tuple[Row, ...]
    """The pretrained encoder stands last."""
    trials: tuple[Trial, ...]
    curves: Mapping[str, Curve]
    """Of the pretrained encoder's classifier, g = 1. validation: of the fit that was chosen."""
    confusion: NDArray[np.int64]
    """Of the test images, (true class, predicted class)."""
    chance: float
    """Test accuracy of naming the most frequent training class always, in percent."""
    encoder_sha256: str | None
    """Over the frozen encoder's weights and buffers, before and after; None where it was trained."""
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> Row:
        """The pretrained encoder's row."""
        return self.rows[-1]

    @property
    def scores(self) -> Scores:
        """What the pretrained encoder's classifier reaches."""
        assert self.trained.classifier is not None
        return self.trained.classifier


def to_plain(result: ProbeResult) -> dict[str, Any]:
    """Return the result as what JSON can hold; numbers that are not finite become null."""
    return {"schema": 1, "test_accuracy": result.scores.test, **_plain(result)}


def _plain(value: Any) -> Any:
    if isinstance(value, Candidate):
        return value._asdict()
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float | str | None) else str(value)
