"""How good a representation is: its features, k nearest neighbours, a linear classifier on top, fine-tuning.

Shape letters: n images asked for, m rows, D representation width, c classes, g candidates trained at once.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr import distributed
from simclr.config import ProbeConfig
from simclr.data import EpochPlan
from simclr.schedule import learning_rate_at
from simclr.unit_length import unit_rows
from simclr.views import View, plain_view

if TYPE_CHECKING:
    from simclr.beton import Facts
    from simclr.data import Batch, ImageSource

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]

# Bound what is held at a time, in elements: kNN's similarities (64 MiB in float32), the candidates' logits (16 MiB).
_SIMILARITIES_AT_ONCE = 1 << 24
_LOGITS_AT_ONCE = 1 << 22


def can_measure_knn(facts: Facts, num_validation: int | None) -> bool:
    """Whether there are labels of several classes, and validation images, for kNN."""
    return bool(num_validation) and facts.is_labelled and facts.num_classes > 1


class DivergedError(ValueError):
    """An encoder's outputs are not finite."""


@dataclass(frozen=True, eq=False)
class Features:
    """Representations of images, with what they are measured against.

    Attributes:
        representation: float32 or float64 (m, D).
        label: int64 (m,), on the same device.
        index: int64 (m,), on the same device: place of each image in its file.
    """

    representation: Tensor
    label: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def rows(self, which: NDArray[np.int64]) -> Features:
        """Return the features at the given rows, in that order."""
        at = torch.from_numpy(which).to(self.label.device)
        return Features(self.representation[at], self.label[at], self.index[at])

    def images(self, which: NDArray[np.int64]) -> Features:
        """Return the features of the given images of the file, in that order; ``index`` is sorted and has them all."""
        return self.rows(np.searchsorted(self.index.cpu().numpy(), which))

    @staticmethod
    def joined(parts: Sequence[Features]) -> Features:
        """Return all rows of the parts, in order."""
        names = ("representation", "label", "index")
        return Features(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


# ---------------------------------------------------------------------------------------------------------------
# Features


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode for a ``with`` block; afterwards each of its parts has the mode that it had before."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


def extract_features(
    encoder: nn.Module,
    source: ImageSource,
    indices: NDArray[np.int64],
    *,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    world_size: int = 1,
    rank: int = 0,
    normalisation: Normalisation | None = None,
    size: int | None = None,
) -> Features:
    """Encode images as they are, without augmentation, in eval mode and without gradients.

    Every image is encoded once, by one rank, and every rank receives all features: none is dropped to make
    batches even, and the result does not depend on ``world_size`` beyond rounding (kernels may sum in another
    order for another batch size). The encoder's training mode is restored.

    Args:
        encoder: (b, 3, H, W) -> (b, D), on ``device``.
        source: Images.
        indices: Which images, int64 (n,).
        batch_size: Images at a time per rank. Changes speed, not results.
        device: Where to compute, and where the features are returned.
        dtype: Of the forward pass: float32 or float64, as the encoder's weights, or bfloat16 / float16 for autocast.
        world_size: Number of ranks that share the work.
        rank: This rank.
        normalisation: Per-channel (mean, std) on the scale where 255 is 1. Default: the source's own, which is
            right for training images only; test images take the training images'.
        size: Side in pixels that images are resized to. None: as stored.

    Returns:
        Features of all n images in the order of ``indices``, float32, on every rank.

    Raises:
        ValueError: If there are no indices.
        DivergedError: If a representation is not finite.

    Note:
        Collective call if ``world_size`` > 1: every rank must make it, with the same indices.
    """
    n = len(indices)
    if n == 0:
        raise ValueError("no images to extract features of: indices is empty")
    mean, std = source.facts.normalisation if normalisation is None else normalisation
    if n < world_size:  # too few to share: every rank encodes them all
        world_size, rank = 1, 0
    own = indices[rank * n // world_size : (rank + 1) * n // world_size]
    representations, labels, seen = [], [], []
    with evaluating(encoder), torch.inference_mode():
        for batch in source.batches(EpochPlan(own, batch_size, shuffle=False, drop_last=False)):
            image = plain_view(batch.image.to(device, non_blocking=True), mean=mean, std=std, size=size)
            with _autocast(device, dtype):
                representations.append(encoder(image.double() if dtype == torch.float64 else image).float())
            labels.append(batch.label.to(device))
            seen.append(batch.index.to(device))
    # Concatenated outside inference mode, whose tensors a later autograd computation would refuse.
    representation, label, index = torch.cat(representations), torch.cat(labels), torch.cat(seen)
    if world_size > 1:
        assert distributed.world_size() == world_size, (distributed.world_size(), world_size)
        representation, label, index = (distributed.gather_variable(part) for part in (representation, label, index))
    assert np.array_equal(index.cpu().numpy(), indices), "the source returned other images than asked for"
    if not bool(representation.isfinite().all()):
        bad = int((~representation.isfinite().all(dim=1)).sum())
        raise DivergedError(f"{bad} of {n} representations are not finite: the encoder's weights have diverged")
    return Features(representation, label, index)


# ---------------------------------------------------------------------------------------------------------------
# k nearest neighbours


def knn_predict(
    bank: Features,
    queries: Features,
    *,
    k: int = 20,
    temperature: float = 0.1,
    num_classes: int,
    before_block: Callable[[], None] = lambda: None,
) -> Tensor:
    """Classify by the k nearest neighbours of each query, weighted by similarity.

    A neighbour with cosine similarity s votes for its label with weight exp(s / temperature). Computed in the
    dtype of the features, for a block of queries at a time.

    Args:
        bank: Labelled features (m, D).
        queries: Features (q, D); their labels are not looked at.
        k: Number of neighbours, at most m.
        temperature: > 0, unitless.
        num_classes: c; labels of the bank lie in [0, c).
        before_block: Called before each block of queries, so that a long computation can give signs of life. The
            number of blocks depends on m and q alone.

    Returns:
        Predicted labels, int64 (q,).

    Raises:
        ValueError: If k, the temperature or a label of the bank is out of range, or the widths differ.

    Source:
        Wu et al. 2018, arXiv:1805.01978, section 3.4; k = 200 and temperature 0.07 there.
    """
    _require_labels(bank, num_classes, "the bank")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}, expected 1 to {len(bank)}, the number of images in the bank")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected > 0")
    if bank.representation.shape[1] != queries.representation.shape[1]:
        raise ValueError(
            f"the bank's features have width {bank.representation.shape[1]}, "
            f"the queries' have {queries.representation.shape[1]}"
        )
    bank_rows = unit_rows(bank.representation)
    predictions = []
    for block in torch.split(queries.representation, max(1, _SIMILARITIES_AT_ONCE // len(bank))):
        before_block()
        similarity, neighbour = (unit_rows(block) @ bank_rows.T).topk(k, dim=1)
        weight = (similarity / temperature).exp()
        votes = weight.new_zeros(len(block), num_classes).scatter_add_(1, bank.label[neighbour], weight)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(
    bank: Features,
    queries: Features,
    *,
    k: int = 20,
    temperature: float = 0.1,
    num_classes: int,
    before_block: Callable[[], None] = lambda: None,
) -> float:
    """Return the percentage of queries that :func:`knn_predict` classifies rightly. Arguments and errors as there."""
    _require_labels(queries, num_classes, "the queries")
    predicted = knn_predict(
        bank, queries, k=k, temperature=temperature, num_classes=num_classes, before_block=before_block
    )
    return 100 * int((predicted == queries.label).sum()) / len(queries)


def _require_labels(features: Features, num_classes: int, what: str) -> None:
    low, high = int(features.label.min()), int(features.label.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{what} holds labels from {low} to {high}, expected 0 to {num_classes - 1}; "
            "images without a label (-1) cannot be measured"
        )


# ---------------------------------------------------------------------------------------------------------------
# Proof that an encoder stays as it is


def fingerprint(module: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of each weight and buffer (name, dtype, shape and bytes), by its state-dict name."""
    digests = {}
    for name, value in module.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        digests[name] = hashlib.sha256(head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return digests


def combined_sha256(digests: Mapping[str, str]) -> str:
    """Return one SHA-256 for a whole :func:`fingerprint`."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


@contextlib.contextmanager
def frozen(encoder: nn.Module) -> Iterator[str]:
    """Keep an encoder as it is for the length of a ``with`` block, and prove at its end that it was.

    The encoder is in eval mode and none of its parameters requires a gradient; afterwards both are as before.

    Yields:
        SHA-256 over all its weights and buffers.

    Raises:
        RuntimeError: At the end of the block, if a weight or buffer changed (named), if a part of the encoder is in
            training mode (its batch normalisation would follow the probe's batches), or if a parameter requires a
            gradient.
    """
    before = fingerprint(encoder)
    required = {parameter: parameter.requires_grad for parameter in encoder.parameters()}
    encoder.requires_grad_(False)
    try:
        with evaluating(encoder):
            yield combined_sha256(before)
            if training := [name or "the encoder itself" for name, part in encoder.named_modules() if part.training]:
                raise RuntimeError(f"the encoder is not frozen: in training mode are {training[:5]}")
            if free := [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]:
                raise RuntimeError(f"the encoder is not frozen: gradients are asked for by {free[:5]}")
            after = fingerprint(encoder)
            if changed := [name for name in sorted(before | after) if before.get(name) != after.get(name)]:
                raise RuntimeError(
                    f"the encoder is not frozen: {len(changed)} of its weights and buffers changed, first {changed[:5]}"
                )
    finally:
        for parameter, requires_grad in required.items():
            parameter.requires_grad_(requires_grad)


# ---------------------------------------------------------------------------------------------------------------
# Linear classifiers


class Candidate(NamedTuple):
    """Hyperparameters to choose among."""

    learning_rate: float
    weight_decay: float


@dataclass(frozen=True, eq=False)
class Curve:
    """What g classifiers reach on one set of images after each epoch.

    Attributes:
        loss: Mean cross-entropy in nats, float64 (epochs, g).
        accuracy: In percent, float64 (epochs, g).
    """

    loss: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    def of_candidate(self, which: int) -> Curve:
        """Return the curve of one of the classifiers, g = 1."""
        return Curve(self.loss[:, [which]], self.accuracy[:, [which]])

    @staticmethod
    def joined(curves: Sequence[Curve]) -> Curve:
        """Return the curves of all classifiers, in order."""
        return Curve(*(np.hstack([getattr(curve, name) for curve in curves]) for name in ("loss", "accuracy")))


@dataclass(frozen=True, eq=False)
class LinearFit:
    """Linear classifiers on representations as they come: the standardisation is folded into the weights.

    Attributes:
        weight: (g, c, D).
        bias: (g, c).
        curves: For each measured set, by its name.
    """

    weight: Tensor
    bias: Tensor
    curves: dict[str, Curve]


Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]
"""An epoch's number -> batches of representation (b, D) and label (b,)."""


def cached_batches(features: Features, *, batch_size: int, seed: int) -> Batches:
    """Return batches of features computed once; each epoch has its own order, the last batch may be smaller."""
    rows = np.arange(len(features), dtype=np.int64)
    plan = EpochPlan(rows, global_batch_size=batch_size, seed=seed, drop_last=False)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for which in plan.batches(epoch):
            at = torch.from_numpy(which).to(features.label.device)
            yield features.representation[at], features.label[at]

    return batches


def augmented_batches(
    encoder: nn.Module,
    source: ImageSource,
    indices: NDArray[np.int64],
    config: ProbeConfig,
    *,
    normalisation: Normalisation,
    device: torch.device | str,
) -> Batches:
    """Return batches of features of augmented images, computed anew each epoch by an encoder that is not trained."""
    plan = EpochPlan(indices, global_batch_size=config.batch_size, seed=config.seed, drop_last=False)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in source.batches(plan, epoch=epoch):
            image = _augment(batch, config, normalisation, epoch, device)
            with torch.no_grad(), _autocast(device, autocast_dtype(config)):
                representation = encoder(image)
            yield representation.float(), batch.label.to(device)

    return batches


def standardisation(features: Features) -> tuple[Tensor, Tensor]:
    """Return each feature's mean and population standard deviation, (D,), computed in float64.

    A feature that is constant but for rounding gets 1 for its deviation, so that dividing by it is harmless.
    """
    rows = features.representation.double()
    mean, std = rows.mean(dim=0), rows.std(dim=0, correction=0)
    constant = std <= 1e-6 * (mean.abs() + std.mean())
    std = torch.where(constant, torch.ones_like(std), std)
    return mean.to(features.representation.dtype), std.to(features.representation.dtype)


def fit_linear(
    batches: Batches,
    candidates: Sequence[Candidate],
    measure: Mapping[str, Features],
    *,
    mean: Tensor,
    std: Tensor,
    num_classes: int,
    epochs: int,
    momentum: float = 0.9,
) -> LinearFit:
    """Fit one multinomial logistic regression per candidate, all on the same batches at once.

    Minimises the mean cross-entropy plus ``weight_decay / 2`` times the squared weights (not the biases) on
    standardised features by SGD with momentum, from weights of zero. The learning rate follows a cosine from its
    candidate's value in the first epoch towards 0. The g classifiers share each batch's matrix products, which
    makes a whole grid cost little more than one fit; they do not influence each other.

    Args:
        batches: Training data.
        candidates: g pairs of learning rate and weight decay.
        measure: Sets whose loss and accuracy are recorded after each epoch. They influence nothing.
        mean: Subtracted from each feature, (D,). The fit is done in its dtype and on its device.
        std: Divides each feature, (D,).
        num_classes: c.
        epochs: Passes over the training data.
        momentum: In [0, 1).

    Returns:
        The classifiers after the last epoch, and the curves. A candidate that diverged has a loss of NaN or inf.

    Raises:
        ValueError: If there is no candidate, or labels of a measured set are out of range.
    """
    if not candidates:
        raise ValueError("no candidates: at least one learning rate and one weight decay are needed")
    for name, features in measure.items():
        _require_labels(features, num_classes, name)
    g, c = len(candidates), num_classes
    # One row per candidate and class; images lie along the columns, so that the softmax runs over contiguous memory
    # (five times as fast on a CPU as with the classes innermost).
    peak = mean.new_tensor([candidate.learning_rate for candidate in candidates]).repeat_interleave(c)[:, None]
    decay = mean.new_tensor([candidate.weight_decay for candidate in candidates]).repeat_interleave(c)[:, None]
    weight, bias = mean.new_zeros(g * c, len(mean)), mean.new_zeros(g * c, 1)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    history: _History = {name: [] for name in measure}
    for epoch in range(epochs):
        learning_rate = peak * learning_rate_at(epoch, peak=1.0, total_steps=epochs)
        for representation, label in batches(epoch):
            x = (representation - mean).div_(std)  # (b, D)
            probability = torch.addmm(bias, weight, x.T).view(g, c, -1).softmax(dim=1)
            # d loss / d logits, (g * c, b)
            error = probability.sub_(F.one_hot(label, c).T.to(x.dtype)).flatten(0, 1).div_(len(label))
            # In place, as the g * c by D matrices are read and written more slowly than they are multiplied.
            torch.addmm(weight_velocity, error, x, beta=momentum, out=weight_velocity).addcmul_(decay, weight)
            torch.add(error.sum(dim=1, keepdim=True), bias_velocity, alpha=momentum, out=bias_velocity)
            weight.addcmul_(learning_rate, weight_velocity, value=-1)
            bias.addcmul_(learning_rate, bias_velocity, value=-1)
        folded_weight, folded_bias = _fold(weight, bias, mean, std)
        for name, features in measure.items():
            history[name].append(_loss_and_accuracy(folded_weight, folded_bias, features, c))
    return LinearFit(folded_weight.view(g, c, -1), folded_bias.view(g, c), _curves(history))


def choose(candidates: Sequence[Candidate], validation: Curve) -> int:
    """Return the candidate with the highest validation accuracy after the last epoch.

    Equal accuracies are decided by the lower validation loss, then by the earlier place.

    Raises:
        ValueError: If every candidate diverged.
    """
    accuracy, loss = validation.accuracy[-1], validation.loss[-1]
    usable = [i for i in range(len(candidates)) if math.isfinite(loss[i])]
    if not usable:
        rates = sorted({candidate.learning_rate for candidate in candidates})
        raise ValueError(f"every candidate diverged; try learning rates below {rates[0]:g}, the smallest of {rates}")
    return min(usable, key=lambda i: (-accuracy[i], loss[i], i))


def _fold(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias that do to plain features what these do to standardised ones."""
    folded = weight.double() / std.double()
    return folded.to(weight.dtype), (bias.double() - (folded @ mean.double())[:, None]).to(bias.dtype)


def _loss_and_accuracy(
    weight: Tensor, bias: Tensor, features: Features, num_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean cross-entropy and accuracy in percent, (g,) each, for weight (g * c, D) and bias (g * c, 1)."""
    loss, right = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    block = max(1, _LOGITS_AT_ONCE // len(bias))
    for start in range(0, len(features), block):
        label = features.label[start : start + block]
        logits = torch.addmm(bias, weight, features.representation[start : start + block].T)
        logits = logits.view(-1, num_classes, len(label))  # (g, c, b)
        log_probability = logits.log_softmax(dim=1).gather(1, label.expand(len(logits), 1, -1))
        loss = loss - log_probability.double().sum(dim=(1, 2)).cpu()
        largest = logits.max(dim=1).indices  # argmax of the same takes five times as long on a CPU
        right = right + (largest == label).sum(dim=1).cpu()
    return loss.numpy() / len(features), 100 * right.double().numpy() / len(features)


# ---------------------------------------------------------------------------------------------------------------
# The whole classifier


class Classifier(nn.Module):
    """Encoder and linear classifier: stored pixels -> logits.

    Args:
        encoder: (b, 3, H, W) -> (b, D).
        head: Linear layer D -> c.
        normalisation: Per-channel (mean, std) on the scale where 255 is 1, of the images pretrained on.
        classes: Names in label order.
        size: Side in pixels that images are resized to. None: as stored.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Linear,
        normalisation: Normalisation,
        classes: Sequence[str],
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.normalisation, self.classes, self.size = normalisation, tuple(classes), size

    def forward(self, image: Tensor) -> Tensor:
        """Classify images as stored: uint8 (b, H, W, 3), RGB -> logits, float32 (b, c)."""
        mean, std = self.normalisation
        logits: Tensor = self.head(self.encoder(plain_view(image, mean=mean, std=std, size=self.size)).float())
        return logits


def linear_head(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return the linear layer with the given weight (c, D) and bias (c,)."""
    head = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head


@torch.no_grad()
def head_predict(head: nn.Linear, features: Features) -> Tensor:
    """Return the predicted labels, int64 (m,)."""
    return torch.cat([head(block).argmax(dim=1) for block in torch.split(features.representation, 8192)])


def confusion_matrix(label: Tensor, predicted: Tensor, *, num_classes: int) -> NDArray[np.int64]:
    """Return how many images of each true class (row) were taken for each class (column), (c, c)."""
    c = num_classes
    counts: NDArray[np.int64] = torch.bincount(label * c + predicted, minlength=c * c).view(c, c).cpu().numpy()
    return counts


def fine_tune(
    encoder: nn.Module,
    source: ImageSource,
    indices: NDArray[np.int64],
    candidate: Candidate,
    measure: Mapping[str, tuple[ImageSource, NDArray[np.int64]]],
    *,
    width: int,
    normalisation: Normalisation,
    config: ProbeConfig,
    device: torch.device | str = "cpu",
) -> tuple[Classifier, dict[str, Curve]]:
    """Train a copy of an encoder and a linear classifier on it together, with labels.

    SGD with Nesterov momentum on the mean cross-entropy of lightly augmented images; weight decay on parameters
    of at least two dimensions; the learning rate falls by a cosine over all steps; the classifier starts at zero.
    As in pretraining, images that do not fill a batch sit out the epoch.

    Args:
        encoder: (b, 3, H, W) -> (b, D); where to start from. Stays as it is.
        source: Training images.
        indices: Which of them.
        candidate: Learning rate and weight decay.
        measure: Sets to measure, plain and in eval mode, after each epoch. They influence nothing.
        width: D.
        normalisation: As :func:`extract_features`.
        config: Augmentation, epochs, batch size (limited by the number of images), momentum, seed, precision.
        device: Where to compute.

    Returns:
        The classifier after the last epoch, in eval mode, and curves with g = 1, where divergence gives a loss of NaN.

    Source:
        Chen et al. 2020, arXiv:2002.05709, appendix B.8.1 (Nesterov momentum 0.9, no warm-up).
    """
    classes = source.facts.classes
    head = linear_head(torch.zeros(len(classes), width), torch.zeros(len(classes)))
    model = Classifier(copy.deepcopy(encoder).requires_grad_(True), head, normalisation, classes).to(device)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.SGD(
        [{"params": matrices, "weight_decay": candidate.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=candidate.learning_rate,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
    )
    plan = EpochPlan(indices, global_batch_size=min(config.batch_size, len(indices)), seed=config.seed)
    total_steps = config.epochs * len(plan)
    dtype = autocast_dtype(config)
    history: _History = {name: [] for name in measure}
    torch.manual_seed(config.seed)
    for epoch in range(config.epochs):
        model.train()
        for step, batch in enumerate(source.batches(plan, epoch=epoch), start=epoch * len(plan)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, peak=candidate.learning_rate, total_steps=total_steps)
            image = _augment(batch, config, normalisation, epoch, device)
            with _autocast(device, dtype):
                representation = model.encoder(image)
            loss = F.cross_entropy(model.head(representation.float()), batch.label.to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for name, (images, which) in measure.items():
            try:
                features = extract_features(
                    model.encoder, images, which, device=device, dtype=dtype, normalisation=normalisation
                )
                weight, bias = model.head.weight.detach(), model.head.bias.detach()
                history[name].append(_loss_and_accuracy(weight, bias[:, None], features, len(classes)))
            except DivergedError:
                history[name].append((np.array([math.nan]), np.array([0.0])))
    return model.eval(), _curves(history)


def autocast_dtype(config: ProbeConfig) -> torch.dtype:
    """Return the dtype of the encoder's forward pass."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]


def _augment(
    batch: Batch, config: ProbeConfig, normalisation: Normalisation, epoch: int, device: torch.device | str
) -> Tensor:
    """Return a view of each image, of the stored size. It is view 0: pretraining draws views 1 and 2."""
    view = View(batch.index, config.seed, epoch, 0, config.view, batch.image.shape[1])
    return view.standard(batch.image.to(device), *normalisation)


def _autocast(device: torch.device | str, dtype: torch.dtype) -> torch.autocast:
    is_lower = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(torch.device(device).type, dtype if is_lower else None, enabled=is_lower)


_History = dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]]


def _curves(history: _History) -> dict[str, Curve]:
    return {
        name: Curve(loss=np.stack([loss for loss, _ in epochs]), accuracy=np.stack([right for _, right in epochs]))
        for name, epochs in history.items()
    }
