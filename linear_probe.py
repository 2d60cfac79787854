"""How good is a pretrained encoder? k nearest neighbours, and a linear classifier (or fine-tuning), with a report.

    python linear_probe.py --run results/cifar10-simclr-100-seed0
    python linear_probe.py --run results/cifar10-simclr-100-seed0 --mode finetune

The encoder stays frozen, which is proven. Learning rate and weight decay are chosen on a part of the training images;
the test images are measured, and choose nothing. Runs in one process, on the first GPU if there is one.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr import beton, checkpoint, evaluation, files, host, launch, report, runlog
from simclr.beton import Facts
from simclr.checkpoint import Pretrained, load_pretrained, require_safe_loading
from simclr.config import ProbeConfig, default_num_validation
from simclr.data import EpochPlan, ImageSource, open_images, validation_split
from simclr.evaluation import Batches, Candidate, Classifier, Curve, Features
from simclr.models import SimCLR
from simclr.report import ProbeResult, Row, Scores, Trial, ViewPairs
from simclr.views import two_views

NUM_PICTURED = 8
MOST_TRAINED_ON = 0.1  # share of the test images; with more training images among them, nothing is measured
LARGEST_PIXEL_FEATURES = 4 << 30  # bytes; beyond this the raw-pixel baseline is left out, and that is said


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
    require_safe_loading()
    started = time.perf_counter()
    for line in launch.require_known_requests():
        print(line, file=sys.stderr, flush=True)
    if (asked := launch.mixed_precision_asked_for()) not in {None, config.precision}:
        raise ValueError(
            f"accelerate is told mixed precision {asked}, but precision is {config.precision}; the probe takes it from "
            "--precision alone (fp32 or bf16)"
        )
    device = torch.device("cuda" if torch.cuda.is_available() and not launch.cpu_is_asked_for() else "cpu")
    if device.type == "cpu":
        host.keep_freed_memory()

    # What was pretrained, and the images to measure it on
    pretrained = load_pretrained(config.run, device)
    train_path, test_path = data_paths(config, pretrained)
    kind = "linear-augmented" if config.mode == "linear" and config.features == "augmented" else config.mode
    output = config.output or pretrained.path.parent / f"probe-{kind}"
    with (
        open_images(train_path, backend=config.loader, device=device) as train,
        open_images(test_path, backend=config.loader, device=device) as test,
    ):
        sizes = choose_sizes(config, pretrained, train)  # first, as it reads no image
        notes = check_data(config, pretrained, train, test)
        config = dataclasses.replace(config, **sizes._asdict())
        fit, validation = validation_split(train.facts.num_images, sizes.num_validation)
        task = Task(config, pretrained, train, test, fit, validation, sizes.knn_neighbours, device)
        output.mkdir(parents=True, exist_ok=True)
        say_start(task, output, notes)

        # Features, then hyperparameters chosen on the validation images, then the final fit: for each representation
        rows = []
        if config.baselines:
            if task.pixels_fit:
                rows.append(said(measure_pixels(task)))
            rows.append(said(measure_encoder(task, "untrained encoder", untrained_encoder(pretrained)).row))
        measured = measure_encoder(task, "pretrained encoder", pretrained.model.encoder)
        rows.append(said(measured.row))
        pairs = picture_views(task)

    # The whole classifier, and the report
    save_and_compare(output / checkpoint.CLASSIFIER, measured.classifier, task)
    manifest, metrics = pretraining_records(pretrained.path.parent)
    result = ProbeResult(
        config=config,
        environment=runlog.environment(),
        checkpoint=pretrained.path,
        pretraining=pretrained.config,
        pretraining_step=pretrained.step,
        pretraining_epoch=pretrained.epoch,
        pretraining_knn=pretrained.knn_accuracy,
        pretraining_manifest=manifest,
        pretraining_facts=pretrained.facts,
        train_path=train_path,
        test_path=test_path,
        train_facts=train.facts,
        test_facts=test.facts,
        num_fit=len(fit),
        rows=tuple(rows),
        trials=measured.trials,
        curves=measured.curves,
        confusion=measured.confusion,
        chance=chance(train.facts, test.facts),
        encoder_sha256=measured.encoder_sha256,
        notes=tuple(notes),
        seconds={**{row.name: row.seconds for row in rows}, "in all": time.perf_counter() - started},
    )
    path = report.write_report(output, result, pairs, metrics)
    print(f"\n{report.summary(result)}\n")
    if remark := report.at_edge(config, result.scores.chosen):
        print(f"{remark}\n")
    print(f"classifier: {output / checkpoint.CLASSIFIER}\nreport:     {path}")
    return path


@dataclass(frozen=True, eq=False)
class Task:
    """What every representation is measured on."""

    config: ProbeConfig
    pretrained: Pretrained
    train: ImageSource
    test: ImageSource
    fit: NDArray[np.int64]
    """Training images that candidates are fitted on."""
    validation: NDArray[np.int64]
    """Training images that candidates are chosen on."""
    knn_neighbours: int
    device: torch.device

    @property
    def candidates(self) -> list[Candidate]:
        """Every learning rate with every weight decay."""
        return [Candidate(*pair) for pair in product(self.config.learning_rates, self.config.weight_decays)]

    @property
    def all_train(self) -> NDArray[np.int64]:
        """Every training image."""
        return np.arange(self.train.facts.num_images, dtype=np.int64)

    @property
    def all_test(self) -> NDArray[np.int64]:
        """Every test image."""
        return np.arange(self.test.facts.num_images, dtype=np.int64)

    @property
    def pixels_fit(self) -> bool:
        """Whether all training images' pixels in float32 stay within what is held at once."""
        facts = self.train.facts
        return facts.num_images * facts.height * facts.width * 3 * 4 <= LARGEST_PIXEL_FEATURES

    def features(self, encoder: nn.Module, source: ImageSource, indices: NDArray[np.int64]) -> Features:
        """Encode images, normalised as in pretraining."""
        return evaluation.extract_features(
            encoder,
            source,
            indices,
            device=self.device,
            dtype=evaluation.autocast_dtype(self.config),
            normalisation=self.pretrained.facts.normalisation,
        )


@dataclass(frozen=True, eq=False)
class Fitted:
    """A chosen and finally fitted classifier."""

    weight: Tensor
    bias: Tensor
    scores: Scores
    trials: tuple[Trial, ...]
    curves: dict[str, Curve]


@dataclass(frozen=True, eq=False)
class Measured:
    """All that is found out about an encoder."""

    row: Row
    classifier: Classifier
    trials: tuple[Trial, ...]
    curves: dict[str, Curve]
    confusion: NDArray[np.int64]
    encoder_sha256: str | None


# ---------------------------------------------------------------------------------------------------------------
# Before anything is computed


def data_paths(config: ProbeConfig, pretrained: Pretrained) -> tuple[Path, Path]:
    """Return the files of the training and test images."""
    train = config.train or pretrained.config.data
    if not train.exists():
        which = "" if config.train else f", the file that {pretrained.path} was pretrained on,"
        raise ValueError(f"{train}{which} is not there; name the training images with --train FILE.beton")
    test = config.test or train.with_name("test.beton")
    if not test.exists():
        raise ValueError(
            f"there are no test images at {test}; name them with --test FILE.beton, or convert them first "
            "(python -m data_prep --help)"
        )
    return train, test


def check_data(config: ProbeConfig, pretrained: Pretrained, train: ImageSource, test: ImageSource) -> list[str]:
    """Refuse images that cannot be measured on; return what the reader of the results has to know."""
    before = pretrained.facts
    for facts, path, option in ((train.facts, train.path, "--train"), (test.facts, test.path, "--test")):
        if not facts.is_labelled:
            raise ValueError(
                f"{path} has {facts.num_images - sum(facts.class_counts):,} images without a label; accuracy needs "
                f"labels. Name a labelled file with {option}"
            )
        if facts.num_classes < 2:
            raise ValueError(
                f"{path} has one class only, {facts.classes[0]!r}, so that every answer is right. Name a file of "
                f"several classes with {option}"
            )
        if (facts.height, facts.width) != (before.height, before.width):
            raise ValueError(
                f"{path} holds images of {facts.height} x {facts.width} pixels, but the encoder was pretrained on "
                f"{before.height} x {before.width}. Convert them to that size, or name another file with {option}"
            )
    if train.facts.classes != test.facts.classes:
        raise ValueError(
            f"the classes differ: {train.path} has {list(train.facts.classes)}, {test.path} has "
            f"{list(test.facts.classes)}. Name files of one data set with --train and --test"
        )
    is_pretraining_file = train.facts.content_sha256 == before.content_sha256
    if not is_pretraining_file and config.train is None:
        raise ValueError(
            f"{train.path} is not the file that was pretrained on: its content has sha256 "
            f"{train.facts.content_sha256[:12]}..., that one's {before.content_sha256[:12]}.... "
            "If it is to be measured on nevertheless, name it with --train"
        )
    train_images, test_images = beton.image_digests(train.path), beton.image_digests(test.path)
    notes = check_test_images(train, test, train_images, test_images)
    if is_pretraining_file:
        return notes
    seen = pretraining_images(pretrained, train.facts)
    known = sum(image in (seen or ()) for image in train_images)
    if known == len(train_images):
        what = f"Measured on images pretrained on: all {known:,} are among pretraining's {before.num_images:,}"
    else:
        what = "Transfer: measured on other images than pretrained on"
        what += f", but for {known:,} of {len(train_images):,}" if known else ""
        if seen is None:
            what += f", as far as is known: {pretrained.config.data} is not there, or stored in another way,"
    notes.append(
        f"{what} ({train.facts.source!r}; pretraining: {before.source!r}). Both are normalised with pretraining's "
        f"statistics: channel means {_three(before.channel_mean)} there, {_three(train.facts.channel_mean)} here; "
        f"deviations {_three(before.channel_std)} there, {_three(train.facts.channel_std)} here."
    )
    if known_test := sum(image in (seen or ()) for image in test_images):
        notes.append(
            f"{known_test:,} of the {len(test_images):,} test images were pretrained on, without their labels."
        )
    return notes


def check_test_images(
    train: ImageSource, test: ImageSource, train_images: list[bytes], test_images: list[bytes]
) -> list[str]:
    """Compare test with training images one by one: refuse too many equal ones, return a note about few."""
    if train.facts.encoding != test.facts.encoding:
        return [
            f"Whether test images are training images was not compared: the ones are {test.facts.encoding}, "
            f"the others {train.facts.encoding}."
        ]
    trained_on = set(train_images)
    equal = sum(image in trained_on for image in test_images)
    share = f"{equal:,} of the {len(test_images):,} test images ({100 * equal / len(test_images):.1f} %)"
    if equal > MOST_TRAINED_ON * len(test_images):
        raise ValueError(
            f"{share} in {test.path} are also training images in {train.path}, pixel by pixel; up to "
            f"{100 * MOST_TRAINED_ON:g} % are measured. Name other images with --test, or divide the images anew "
            "(python -m data_prep imagefolder --test-fraction 0.1)"
        )
    return [f"{share} are also training images, pixel by pixel."] if equal else []


def pretraining_images(pretrained: Pretrained, like: Facts) -> set[bytes] | None:
    """Return digests of the images pretrained on; None if their file is gone, or stored unlike ``like``."""
    path, facts = pretrained.config.data, pretrained.facts
    try:
        if facts.encoding == like.encoding and beton.load_facts(path).content_sha256 == facts.content_sha256:
            return set(beton.image_digests(path))
    except beton.BetonError:
        pass  # it is not needed for anything else
    return None


class Sizes(NamedTuple):
    """What depends on the number of training images, unless it is given; by the settings' names."""

    num_validation: int
    knn_neighbours: int
    batch_size: int


def choose_sizes(config: ProbeConfig, pretrained: Pretrained, train: ImageSource) -> Sizes:
    """Return what is given, as far as it fits, and defaults for the rest.

    Raises:
        ValueError: If it does not fit; the message names all that must change, with values that work.
    """
    n = train.facts.num_images
    if n < 2:
        raise ValueError(f"{train.path} has 1 image, but one is needed to fit on and another one to choose on")
    usual = max(1, default_num_validation(n))
    as_before = pretrained.config.num_validation if n == pretrained.facts.num_images else None
    num_validation = config.num_validation or as_before or usual
    neighbours = config.knn_neighbours or min(20, max(1, n - num_validation))
    if num_validation + neighbours > n:
        given = {"--num-validation": num_validation, "--knn-neighbours": neighbours}
        fitting = {"--num-validation": usual, "--knn-neighbours": min(neighbours, n - usual)}
        changes = ", ".join(f"{name} {value}" for name, value in fitting.items() if value != given[name])
        raise ValueError(
            f"num_validation {num_validation} leaves {max(0, n - num_validation)} of the {n} images of {train.path}, "
            f"but {neighbours} neighbours are needed; use {changes}"
        )
    return Sizes(num_validation, neighbours, min(config.batch_size, n))


def say_start(task: Task, output: Path, notes: list[str]) -> None:
    """Print what is going to be done."""
    config, pretrained = task.config, task.pretrained
    print(f"encoder:    {pretrained.path} ({pretrained.config.model.encoder}, epoch {pretrained.epoch})")
    for name, source in (("train:", task.train), ("test:", task.test)):
        print(f"{name:<12}{source.path}, {source.facts.num_images:,} images ({source.reason})")
    print(
        f"choice:     {task.train.facts.num_images:,} training images = {len(task.fit):,} to fit "
        f"+ {len(task.validation):,} to choose on"
    )
    print(f"kNN:        {task.knn_neighbours} neighbours; classifier: batches of {config.batch_size}")
    print(
        f"candidates: {len(config.learning_rates)} learning rates x {len(config.weight_decays)} weight decays = "
        f"{len(task.candidates)}, {config.epochs} epochs each ({config.mode})"
    )
    print(f"device:     {task.device} ({runlog.hardware()}), {config.precision}\noutput:     {output}")
    if (output / report.RESULT).exists():
        print("note:       replaces the earlier evaluation there")
    for note in notes:
        print(f"note:       {note}")
    if config.baselines and not task.pixels_fit:
        print(f"note:       raw pixels are left out: they would take more than {LARGEST_PIXEL_FEATURES >> 30} GiB")
    print(flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def measure_pixels(task: Task) -> Row:
    """Measure the images themselves."""
    started = time.perf_counter()
    normalisation = task.pretrained.facts.normalisation
    train = evaluation.raw_pixel_features(task.train, task.all_train, normalisation=normalisation)
    centre = evaluation.mean_image(train)
    train.representation.sub_(centre)
    test = evaluation.raw_pixel_features(task.test, task.all_test, normalisation=normalisation, centre=centre)
    knn_validation, knn_test = measure_knn(task, train, test)
    scores = None
    if task.config.mode == "linear":  # there is nothing to fine-tune in pixels
        scores = choose_and_fit(task, train, test, cached(task, train)).scores
    width = train.representation.shape[1]
    return Row("raw pixels", width, knn_validation, knn_test, scores, time.perf_counter() - started)


def measure_encoder(task: Task, name: str, encoder: nn.Module) -> Measured:
    """Measure an encoder: kNN, and a classifier that is chosen, fitted on all training images, and tested."""
    started = time.perf_counter()
    encoder_sha256 = None
    with evaluation.frozen(encoder) as sha256:
        train = task.features(encoder, task.train, task.all_train)
        test = task.features(encoder, task.test, task.all_test)
        knn_validation, knn_test = measure_knn(task, train, test)
        if task.config.mode == "linear":
            draw = cached(task, train) if task.config.features == "cached" else augmented(task, encoder)
            fitted = choose_and_fit(task, train, test, draw)
            head = evaluation.linear_head(fitted.weight, fitted.bias)
            normalisation, classes = task.pretrained.facts.normalisation, task.train.facts.classes
            classifier = Classifier(encoder, head, normalisation, classes).eval()
            scores, trials, curves = fitted.scores, fitted.trials, fitted.curves
            encoder_sha256 = sha256
    width = train.representation.shape[1]
    if task.config.mode == "finetune":
        classifier, scores, trials, curves = choose_and_fine_tune(task, encoder, width)
        test = task.features(classifier.encoder, task.test, task.all_test)
    row = Row(name, width, knn_validation, knn_test, scores, time.perf_counter() - started)
    predicted = evaluation.head_predict(classifier.head, test)
    return Measured(
        row, classifier, trials, curves, confusion_matrix(test.label, predicted, classifier), encoder_sha256
    )


def measure_knn(task: Task, train: Features, test: Features) -> tuple[float, float]:
    """Return kNN accuracy on the validation images (bank: the others) and on the test images (bank: all)."""

    def accuracy(bank: Features, queries: Features) -> float:
        return evaluation.knn_accuracy(
            bank,
            queries,
            k=task.knn_neighbours,
            temperature=task.config.knn_temperature,
            num_classes=task.train.facts.num_classes,
        )

    return accuracy(train.rows(task.fit), train.rows(task.validation)), accuracy(train, test)


Draw = Callable[[NDArray[np.int64]], Batches]
"""Training images -> batches of their features, by epoch."""


def cached(task: Task, train: Features) -> Draw:
    """Features computed once, of the images as they are."""
    config = task.config
    return lambda which: evaluation.cached_batches(train.rows(which), batch_size=config.batch_size, seed=config.seed)


def augmented(task: Task, encoder: nn.Module) -> Draw:
    """Features of augmented images, anew in each epoch."""
    config = task.config
    return lambda which: evaluation.augmented_batches(
        encoder,
        task.train,
        which,
        view=config.view,
        normalisation=task.pretrained.facts.normalisation,
        batch_size=config.batch_size,
        seed=config.seed,
        device=task.device,
        dtype=evaluation.autocast_dtype(config),
    )


def choose_and_fit(task: Task, train: Features, test: Features, draw: Draw) -> Fitted:
    """Choose the linear classifier's hyperparameters on the validation images, then fit it on all training images."""
    candidates, config = task.candidates, task.config

    def fit(which: NDArray[np.int64], tried: list[Candidate], measure: dict[str, Features]) -> evaluation.LinearFit:
        mean, std = evaluation.standardisation(train.rows(which))
        return evaluation.fit_linear(
            draw(which),
            tried,
            measure,
            mean=mean,
            std=std,
            num_classes=task.train.facts.num_classes,
            epochs=config.epochs,
            momentum=config.momentum,
        )

    trials = fit(task.fit, candidates, {"validation": train.rows(task.validation)}).curves["validation"]
    best = evaluation.choose(candidates, trials)
    final = fit(task.all_train, [candidates[best]], {"train": train, "test": test})
    curves = {"train": final.curves["train"], "validation": column(trials, best), "test": final.curves["test"]}
    return Fitted(
        final.weight[0], final.bias[0], scores_of(curves, candidates[best]), listed(candidates, trials), curves
    )


def choose_and_fine_tune(
    task: Task, encoder: nn.Module, width: int
) -> tuple[Classifier, Scores, tuple[Trial, ...], dict[str, Curve]]:
    """Choose fine-tuning's hyperparameters on the validation images, then fine-tune on all training images."""
    candidates = task.candidates

    def fine_tune(
        which: NDArray[np.int64], candidate: Candidate, measure: dict[str, tuple[ImageSource, NDArray[np.int64]]]
    ) -> tuple[Classifier, dict[str, Curve]]:
        normalisation = task.pretrained.facts.normalisation
        return evaluation.fine_tune(
            encoder,
            task.train,
            which,
            candidate,
            measure,
            width=width,
            normalisation=normalisation,
            config=task.config,
            device=task.device,
        )

    tried = []
    for number, candidate in enumerate(candidates, start=1):
        _, curves = fine_tune(task.fit, candidate, {"validation": (task.train, task.validation)})
        tried.append(curves["validation"])
        print(
            f"  candidate {number} of {len(candidates)}: learning rate {candidate.learning_rate:g}, weight decay "
            f"{candidate.weight_decay:g}: validation {curves['validation'].accuracy[-1, 0]:.2f} %",
            flush=True,
        )
    trials = Curve(np.hstack([curve.loss for curve in tried]), np.hstack([curve.accuracy for curve in tried]))
    best = evaluation.choose(candidates, trials)
    measure = {"train": (task.train, task.all_train), "test": (task.test, task.all_test)}
    classifier, final = fine_tune(task.all_train, candidates[best], measure)
    curves = {"train": final["train"], "validation": column(trials, best), "test": final["test"]}
    return classifier, scores_of(curves, candidates[best]), listed(candidates, trials), curves


def column(curve: Curve, which: int) -> Curve:
    """Return the curve of one candidate."""
    return Curve(curve.loss[:, [which]], curve.accuracy[:, [which]])


def listed(candidates: list[Candidate], curve: Curve) -> tuple[Trial, ...]:
    """Return what each candidate reached after the last epoch."""
    last = zip(candidates, curve.accuracy[-1], curve.loss[-1], strict=True)
    return tuple(Trial(candidate, float(accuracy), float(loss)) for candidate, accuracy, loss in last)


def scores_of(curves: dict[str, Curve], chosen: Candidate) -> Scores:
    """Return what was reached after the last epoch."""
    accuracy = {name: float(curve.accuracy[-1, 0]) for name, curve in curves.items()}
    loss = {f"{name}_loss": float(curve.loss[-1, 0]) for name, curve in curves.items()}
    return Scores(**accuracy, **loss, chosen=chosen)


def untrained_encoder(pretrained: Pretrained) -> nn.Module:
    """Return the pretrained encoder as it was before its first step: same architecture, same seed."""
    device = next(pretrained.model.parameters()).device
    torch.manual_seed(pretrained.config.seed)
    return SimCLR(pretrained.config.model, pretrained.facts.height).encoder.to(device).eval()


def confusion_matrix(label: Tensor, predicted: Tensor, classifier: Classifier) -> NDArray[np.int64]:
    """Return how many images of each true class (row) were taken for each class (column)."""
    c = len(classifier.classes)
    counts: NDArray[np.int64] = torch.bincount(label * c + predicted, minlength=c * c).view(c, c).cpu().numpy()
    return counts


def chance(train: Facts, test: Facts) -> float:
    """Return the test accuracy of naming the commonest training class always, in percent."""
    return 100 * test.class_counts[int(np.argmax(train.class_counts))] / test.num_images


# ---------------------------------------------------------------------------------------------------------------
# Afterwards


def save_and_compare(path: Path, classifier: Classifier, task: Task) -> None:
    """Save the classifier, and prove that what is loaded back is what was measured."""
    checkpoint.save_classifier(
        path,
        classifier,
        pretraining=task.pretrained.config,
        pretraining_facts=task.pretrained.facts,
        probe=task.config,
    )
    if evaluation.fingerprint(checkpoint.load_classifier(path)) != evaluation.fingerprint(classifier):
        raise RuntimeError(f"{path} does not hold the classifier that was measured: the disk returned other bytes")


def picture_views(task: Task) -> ViewPairs:
    """Return images spread over the training file, with the views that pretraining's first epoch makes of them."""
    run, facts = task.pretrained.config, task.train.facts
    which = np.unique(np.linspace(0, facts.num_images - 1, NUM_PICTURED).astype(np.int64))
    (batch,) = task.train.batches(EpochPlan(which, len(which), shuffle=False))
    mean, std = task.pretrained.facts.normalisation
    views = two_views(
        batch.image, batch.index, run.view_1, run.view_2, seed=run.seed, epoch=0, size=facts.height, mean=mean, std=std
    )

    def pixels(view: Tensor) -> NDArray[np.uint8]:
        scaled = view.cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        array: NDArray[np.uint8] = (255 * scaled).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return array

    names = tuple(facts.classes[label] for label in batch.label.tolist())
    return ViewPairs(batch.image.cpu().numpy(), pixels(views[0]), pixels(views[1]), names)


def pretraining_records(folder: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return manifest and metrics of the run, as far as they lie beside the checkpoint."""
    has_metrics = (folder / runlog.METRICS).is_file()
    return runlog.read_manifest(folder), runlog.read_metrics(folder) if has_metrics else []


def said(row: Row) -> Row:
    """Print a row as soon as it is measured; return it."""
    scores = row.classifier
    tested = "" if scores is None else f", classifier: test {scores.test:.2f} %"
    print(f"{row.name}: kNN: test {row.knn_test:.2f} %{tested} ({row.seconds:.1f} s)", flush=True)
    return row


def _three(values: tuple[float, float, float]) -> str:
    return "(" + ", ".join(f"{value:.3f}" for value in values) + ")"


def cli() -> None:
    """Run :func:`main` with the options of the command line."""
    host.outlive_readers()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit(
            f"linear_probe.py runs in one process, but {os.environ['WORLD_SIZE']} were started. Use: "
            f"python linear_probe.py {shlex.join(sys.argv[1:])}"
        )
    try:
        main(tyro.cli(ProbeConfig, description=__doc__))
    except ValueError as error:  # what the user can put right; anything else keeps its traceback
        sys.exit(f"linear_probe.py: {error}")


if __name__ == "__main__":
    cli()
