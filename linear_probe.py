"""How good is a pretrained encoder? k nearest neighbours, and a linear classifier (or fine-tuning), with a report.

    python linear_probe.py --run results/cifar10-simclr-100-seed0
    python linear_probe.py --run results/cifar10-simclr-100-seed0 --mode finetune --label-fraction 0.01

The encoder stays frozen, which is proven. Learning rate and weight decay are chosen on a part of the training images;
the test images are measured, and choose nothing. Runs in one process, on the first GPU if there is one.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from simclr import evaluation, files, report, system
from simclr.command_line import parse_probe_config
from simclr.config import ProbeConfig
from simclr.data import ImageSource
from simclr.evaluation import Batches, Candidate, Classifier, Curve, Features
from simclr.models import SimCLR
from simclr.report import ProbeResult, Row, Scores, Trial
from simclr.run import checkpoint, launch, runlog
from simclr.run.probe import Probe, open_probe


@files.explain_refusals()
def main(config: ProbeConfig) -> Path:
    """Evaluate a pretrained encoder and write the report.

    Args:
        config: What to evaluate, and how.

    Returns:
        The report (HTML); simclr_lin_best.pt, probe.json, report.md and the figures lie beside it.

    Raises:
        ValueError: If the run, the data and the configuration do not fit together; the message says what to do.
        RuntimeError: If the frozen encoder did not stay as it was.
    """
    started = time.perf_counter()
    if config.pdf:
        report.require_pdf()
    with open_probe(config) as probe:
        # For each representation: features, hyperparameters chosen on the validation images, a final fit, the test
        rows = list(measure_baselines(probe)) if config.baselines else []
        measured = measure_encoder(probe, "pretrained encoder", probe.pretrained.model.encoder)
        rows.append(measured.row)
        pictures = report.Pictures(
            report.view_pairs(probe.train, probe.pretrained.config, probe.pretrained.facts.normalisation),
            report.find_neighbours(probe.train, probe.test, measured.train, measured.test, seed=config.seed),
            report.make_map(measured.test, at_most=config.map_points, seed=config.seed),
        )

    # The whole classifier, and the report
    pretrained, train, test = probe.pretrained, probe.train.facts, probe.test.facts
    checkpoint.save_classifier(
        probe.output / checkpoint.CLASSIFIER,
        measured.classifier,
        pretraining=pretrained.config,
        pretraining_facts=pretrained.facts,
        probe=probe.config,
    )
    result = ProbeResult(
        config=probe.config,
        environment=runlog.environment(),
        checkpoint=pretrained.path,
        pretraining=pretrained.config,
        pretraining_step=pretrained.step,
        pretraining_epoch=pretrained.epoch,
        pretraining_knn=pretrained.knn_accuracy,
        pretraining_manifest=probe.pretraining_manifest,
        pretraining_facts=pretrained.facts,
        train_path=probe.train.path,
        test_path=probe.test.path,
        train_facts=train,
        test_facts=test,
        num_fit=len(probe.fit),
        num_labelled=len(probe.labelled),
        rows=tuple(rows),
        trials=measured.fitted.trials,
        curves=measured.fitted.curves,
        confusion=measured.confusion,
        chance=100 * test.class_counts[int(np.argmax(train.class_counts))] / test.num_images,
        encoder_sha256=measured.encoder_sha256,
        notes=probe.notes,
        seconds={
            **{row.name: row.seconds for row in rows},
            **pictures.seconds,
            "in all": time.perf_counter() - started,
        },
    )
    if probe.config.label_fraction < 1:
        report.write_labels(probe.output, train, probe.config, fit=probe.fit, validation=probe.validation)
    path = report.write_report(probe.output, result, pictures, probe.pretraining_metrics)
    say_result(result, path)
    return path


# ---------------------------------------------------------------------------------------------------------------
# The protocol


@dataclass(frozen=True, eq=False)
class Measured:
    """All that is found out about an encoder."""

    row: Row
    classifier: Classifier
    fitted: Fitted
    confusion: NDArray[np.int64]
    encoder_sha256: str | None
    train: Features
    """Of the encoder as it was given, before any fine-tuning, as ``test``."""
    test: Features


def features_of(probe: Probe, encoder: nn.Module, source: ImageSource, size: int | None = None) -> Features:
    """Return the representations of a file's labelled images, normalised as in pretraining, read at side ``size``."""
    return evaluation.extract_features(
        encoder,
        source,
        probe.images(source),
        device=probe.device,
        dtype=evaluation.autocast_dtype(probe.config),
        normalisation=probe.pretrained.facts.normalisation,
        size=size,
    )


def training_features(probe: Probe, encoder: nn.Module) -> tuple[Features, int, float]:
    """Return the training images' representations, the side they are read at, and its validation kNN accuracy.

    The side is the one with the highest such accuracy; of equal ones, the first.
    """

    def read(size: int) -> tuple[Features, int, float]:
        features = features_of(probe, encoder, probe.train, size)
        accuracy = knn_validation(probe, features)
        if len(probe.config.image_sizes) > 1:
            print(f"  read at {size} pixels: validation kNN {accuracy:.2f} %", flush=True)
        return features, size, accuracy

    # max holds two sides' features at a time
    return max(map(read, probe.config.image_sizes or (probe.train.facts.height,)), key=lambda one: one[2])


def measure_encoder(probe: Probe, name: str, encoder: nn.Module) -> Measured:
    """Measure an encoder: kNN, and a classifier that is chosen, fitted on all labelled images, and tested."""
    started, config, facts = time.perf_counter(), probe.config, probe.train.facts
    with evaluation.frozen(encoder) as sha256:
        train, size, on_validation = training_features(probe, encoder)
        test = features_of(probe, encoder, probe.test, size)
        knn = on_validation, knn_accuracy(probe, train, test)
        width = train.representation.shape[1]
        if config.mode == "linear":
            batches_of = stored_images(probe, train) if config.features == "cached" else new_views(probe, encoder)
            fitted = choose_and_fit(probe, linear_classifiers(probe, encoder, train, test, batches_of))
    if config.mode == "finetune":
        fitted = choose_and_fit(probe, fine_tuned_classifiers(probe, encoder, width))
    tested = test if config.mode == "linear" else features_of(probe, fitted.encoder, probe.test)
    confusion = evaluation.confusion_matrix(
        tested.label, evaluation.head_predict(fitted.head, tested), num_classes=facts.num_classes
    )
    normalisation = probe.pretrained.facts.normalisation
    classifier = Classifier(fitted.encoder, fitted.head, normalisation, facts.classes, size).eval()
    row = Row(name, width, *knn, fitted.scores, time.perf_counter() - started, size)
    say_row(row)
    return Measured(row, classifier, fitted, confusion, sha256 if config.mode == "linear" else None, train, test)


def knn_validation(probe: Probe, train: Features) -> float:
    """Return kNN accuracy on the validation images; the images to fit on are the bank."""
    return knn_accuracy(probe, train.images(probe.fit), train.images(probe.validation))


def knn_accuracy(probe: Probe, bank: Features, queries: Features) -> float:
    """Return the percentage of the queries that their nearest neighbours in the bank classify rightly."""
    k, classes = probe.config.knn_neighbours, probe.train.facts.num_classes
    assert k is not None
    return evaluation.knn_accuracy(bank, queries, k=k, temperature=probe.config.knn_temperature, num_classes=classes)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A classifier, fitted with chosen hyperparameters, and how it came about."""

    encoder: nn.Module
    head: nn.Linear
    scores: Scores
    trials: tuple[Trial, ...]
    curves: dict[str, Curve]


Fit = Callable[[NDArray[np.int64], Sequence[Candidate], Sequence[str]], tuple[nn.Module, nn.Linear, dict[str, Curve]]]
"""Training images to fit on, candidates, sets to measure after each epoch -> encoder and linear layer of the last
candidate, and the curves of all candidates on each set."""


def choose_and_fit(probe: Probe, fit: Fit) -> Fitted:
    """Choose hyperparameters on the validation images, then fit on all labelled ones, and test that fit alone."""
    candidates = probe.candidates
    *_, tried = fit(probe.fit, candidates, ["validation"])
    validation = tried["validation"]
    best = evaluation.choose(candidates, validation)
    encoder, head, final = fit(probe.labelled, [candidates[best]], ["train", "test"])
    curves = {"train": final["train"], "validation": validation.of_candidate(best), "test": final["test"]}
    last_epoch = zip(candidates, validation.accuracy[-1].tolist(), validation.loss[-1].tolist(), strict=True)
    trials = tuple(Trial(candidate, accuracy, loss) for candidate, accuracy, loss in last_epoch)
    return Fitted(encoder, head, Scores.after_last_epoch(curves, candidates[best]), trials, curves)


BatchesOf = Callable[[NDArray[np.int64]], Batches]
"""Training images -> batches of their features, by epoch."""


def stored_images(probe: Probe, train: Features) -> BatchesOf:
    """Return features computed once, of the images as they are."""
    config = probe.config
    return lambda which: evaluation.cached_batches(train.images(which), batch_size=config.batch_size, seed=config.seed)


def new_views(probe: Probe, encoder: nn.Module) -> BatchesOf:
    """Return features of augmented images, anew in each epoch."""
    normalisation = probe.pretrained.facts.normalisation
    return lambda which: evaluation.augmented_batches(
        encoder, probe.train, which, probe.config, normalisation=normalisation, device=probe.device
    )


def linear_classifiers(probe: Probe, encoder: nn.Module, train: Features, test: Features, batches_of: BatchesOf) -> Fit:
    """Return the fit of linear classifiers on an encoder's features, all candidates at once."""

    def fit(
        which: NDArray[np.int64], candidates: Sequence[Candidate], measured: Sequence[str]
    ) -> tuple[nn.Module, nn.Linear, dict[str, Curve]]:
        sets = {"validation": train.images(probe.validation), "train": train, "test": test}
        mean, std = evaluation.standardisation(train.images(which))
        found = evaluation.fit_linear(
            batches_of(which),
            candidates,
            {name: sets[name] for name in measured},
            mean=mean,
            std=std,
            num_classes=probe.train.facts.num_classes,
            epochs=probe.config.epochs,
            momentum=probe.config.momentum,
        )
        return encoder, evaluation.linear_head(found.weight[-1], found.bias[-1]), found.curves

    return fit


def fine_tuned_classifiers(probe: Probe, encoder: nn.Module, width: int) -> Fit:
    """Return the fit of encoder and linear classifier together, from the given encoder, one candidate after another."""
    sets = {
        "validation": (probe.train, probe.validation),
        "train": (probe.train, probe.labelled),
        "test": (probe.test, probe.images(probe.test)),
    }

    def fit(
        which: NDArray[np.int64], candidates: Sequence[Candidate], measured: Sequence[str]
    ) -> tuple[nn.Module, nn.Linear, dict[str, Curve]]:
        tried = []
        for number, candidate in enumerate(candidates, start=1):
            classifier, curves = evaluation.fine_tune(
                encoder,
                probe.train,
                which,
                candidate,
                {name: sets[name] for name in measured},
                width=width,
                normalisation=probe.pretrained.facts.normalisation,
                config=probe.config,
                device=probe.device,
            )
            tried.append(curves)
            if "validation" in curves:
                print(
                    f"  candidate {number} of {len(candidates)}: learning rate {candidate.learning_rate:g}, "
                    f"weight decay {candidate.weight_decay:g}: validation {curves['validation'].accuracy[-1, 0]:.2f} %",
                    flush=True,
                )
        joined = {name: Curve.joined([curves[name] for curves in tried]) for name in measured}
        return classifier.encoder, classifier.head, joined

    return fit


# ---------------------------------------------------------------------------------------------------------------
# Baselines, by the same code


def measure_baselines(probe: Probe) -> Iterator[Row]:
    """Measure the pixels themselves and the encoder as it was before its first step."""
    if probe.has_room_for_pixels:
        yield measure_pixels(probe)
    pretrained = probe.pretrained
    torch.manual_seed(pretrained.config.seed)
    untrained = SimCLR(pretrained.config.model, pretrained.facts.height).encoder.to(probe.device).eval()
    yield measure_encoder(probe, "untrained encoder", untrained).row


def pixels(probe: Probe) -> tuple[Features, Features]:
    """Return training and test images as features themselves, normalised, less the mean training image."""
    train, test = (features_of(probe, nn.Flatten(), source) for source in (probe.train, probe.test))
    centre = train.representation.double().mean(dim=0).float()
    for features in (train, test):
        features.representation.sub_(centre)
    return train, test


def measure_pixels(probe: Probe) -> Row:
    """Measure the images themselves."""
    started = time.perf_counter()
    train, test = pixels(probe)
    knn = knn_validation(probe, train), knn_accuracy(probe, train, test)
    scores = None
    if probe.config.mode == "linear":  # there is nothing to fine-tune in pixels
        classifiers = linear_classifiers(probe, nn.Identity(), train, test, stored_images(probe, train))
        scores = choose_and_fit(probe, classifiers).scores
    row = Row("raw pixels", train.representation.shape[1], *knn, scores, time.perf_counter() - started)
    say_row(row)
    return row


# ---------------------------------------------------------------------------------------------------------------
# What is said


def say_row(row: Row) -> None:
    """Print what was measured of a representation."""
    tested = "" if row.classifier is None else f", classifier: test {row.classifier.test:.2f} %"
    print(f"{row.name}: kNN: test {row.knn_test:.2f} %{tested} ({row.seconds:.1f} s)", flush=True)


def say_result(result: ProbeResult, path: Path) -> None:
    """Print all numbers, and where they lie."""
    print(f"\n{report.summary(result)}\n")
    if remark := report.at_edge(result.config, result.scores.chosen):
        print(f"{remark}\n")
    print(f"classifier: {path.parent / checkpoint.CLASSIFIER}\nreport:     {path}")
    if result.config.pdf:
        print(f"            {path.with_suffix('.pdf')}")


def cli() -> None:
    """Run :func:`main` with the options of the command line."""
    system.outlive_readers()
    try:
        if (started := launch.from_environment("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"runs in one process, but {started} were started. Use: python linear_probe.py "
                f"{shlex.join(sys.argv[1:])}"
            )
        main(parse_probe_config(description=__doc__))
    except ValueError as error:  # what the user can put right; anything else keeps its traceback
        sys.exit(f"linear_probe.py: {error}")


if __name__ == "__main__":
    cli()
