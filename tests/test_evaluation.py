"""Features, kNN, linear classifiers and fine-tuning against plain references; what is frozen stays frozen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from simclr import beton, evaluation
from simclr.config import ProbeConfig, TrainConfig
from simclr.data import ImageSource, open_images
from simclr.evaluation import Candidate, Classifier, Curve, DivergedError, Features
from simclr.models import ModelConfig, make_encoder
from simclr.run import checkpoint
from simclr.views import ViewSpec, apply_view, sample_parameters
from tests.helpers import library_knn, run_distributed

SIDE, NUM_IMAGES, WIDTH = 16, 61, 32
NORMALISATION = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
FLIP_AND_CROP = ViewSpec(crop_scale=(0.5, 1.0), jitter_probability=0.0, grayscale_probability=0.0)


def coloured_images(n: int, num_classes: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noise around a colour that depends on the label, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % num_classes
    colours = np.random.default_rng(99).uniform(60, 200, (num_classes, 1, 1, 3))
    images = colours[labels] + rng.normal(0, 45, (n, SIDE, SIDE, 3))
    return images.clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.beton"
    images, labels = coloured_images(NUM_IMAGES, 4, seed=0)
    beton.write(path, images, labels)
    return path


@pytest.fixture
def source(file: Path) -> Iterator[ImageSource]:
    with open_images(file, backend="memory") as opened:
        yield opened


def an_encoder() -> nn.Module:
    """A small encoder (b, 3, 16, 16) -> (b, 32) whose batch normalisations have seen other statistics than 0 and 1."""
    torch.manual_seed(1)
    encoder = make_encoder("small_resnet_w8", "auto", SIDE)
    generator = torch.Generator().manual_seed(2)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
    return encoder


def random_features(m: int, width: int, num_classes: int, seed: int, dtype: torch.dtype = torch.float64) -> Features:
    """Overlapping clusters."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(num_classes, (m,), generator=generator)
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(77), dtype=torch.float64)
    rows = 0.6 * centres[label] + torch.randn(m, width, generator=generator, dtype=torch.float64)
    return Features((3 * rows + 1).to(dtype), label, torch.arange(m))


# ---------------------------------------------------------------------------------------------------------------
# Features


def test_features_are_the_encoders_output_in_eval_mode_in_the_order_asked_for(source: ImageSource) -> None:
    encoder = an_encoder().train()
    indices = np.array([7, 60, 3, 22, 4], dtype=np.int64)
    features = evaluation.extract_features(encoder, source, indices, batch_size=2, normalisation=NORMALISATION)
    images, labels = beton.read(source.path)
    mean, std = np.array(NORMALISATION)
    pixels = (images[indices] / 255 - mean) / std
    reference = encoder.double().eval()
    with torch.no_grad():
        expected = reference(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert features.representation.dtype == torch.float32
    torch.testing.assert_close(features.representation.double(), expected, rtol=1e-4, atol=1e-5)
    assert features.index.tolist() == indices.tolist()
    assert features.label.tolist() == labels[indices].tolist()


def test_extraction_changes_nothing_in_the_encoder_and_restores_mixed_training_modes(source: ImageSource) -> None:
    encoder = an_encoder().train()
    frozen_part = next(module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d))
    frozen_part.eval()
    before, modes = evaluation.fingerprint(encoder), [module.training for module in encoder.modules()]
    features = evaluation.extract_features(encoder, source, np.arange(NUM_IMAGES))
    assert evaluation.fingerprint(encoder) == before
    assert [module.training for module in encoder.modules()] == modes
    assert not features.representation.requires_grad
    # usable in a later autograd computation, which tensors of inference mode are not
    weight = torch.ones(WIDTH, requires_grad=True)
    (features.representation @ weight).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None


def test_the_files_own_statistics_are_the_default_normalisation(source: ImageSource) -> None:
    encoder, indices = an_encoder(), np.arange(10)
    default = evaluation.extract_features(encoder, source, indices)
    own = evaluation.extract_features(encoder, source, indices, normalisation=source.facts.normalisation)
    other = evaluation.extract_features(encoder, source, indices, normalisation=NORMALISATION)
    assert torch.equal(default.representation, own.representation)
    assert not torch.allclose(default.representation, other.representation)


def test_bf16_features_are_near_and_float32(source: ImageSource) -> None:
    encoder, indices = an_encoder(), np.arange(20)
    exact = evaluation.extract_features(encoder, source, indices).representation
    rounded = evaluation.extract_features(encoder, source, indices, dtype=torch.bfloat16).representation
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.05


def test_representations_that_are_not_finite_are_refused(source: ImageSource) -> None:
    encoder = an_encoder()
    with torch.no_grad():
        next(encoder.parameters()).fill_(math.inf)
    with pytest.raises(DivergedError, match="5 of 5 representations are not finite"):
        evaluation.extract_features(encoder, source, np.arange(5))
    with pytest.raises(ValueError, match="indices is empty"):
        evaluation.extract_features(encoder, source, np.arange(0))


def _features_on_rank(rank: int, world_size: int, path: Path, num_images: int) -> tuple[Tensor, Tensor, Tensor]:
    indices = np.random.default_rng(5).permutation(NUM_IMAGES)[:num_images]
    with open_images(path, backend="memory") as opened:
        features = evaluation.extract_features(
            an_encoder(), opened, indices, batch_size=8, world_size=world_size, rank=rank
        )
    return features.representation, features.label, features.index


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "num_images"), [(2, NUM_IMAGES), (3, 31), (3, 2)])
def test_every_rank_gets_the_features_of_one_process(file: Path, world_size: int, num_images: int) -> None:
    representation, label, index = _features_on_rank(0, 1, file, num_images)
    assert len(index) == num_images
    answers = run_distributed(_features_on_rank, world_size, file, num_images)
    assert len(answers) == world_size
    for answer in answers:
        torch.testing.assert_close(answer[0], representation, rtol=0, atol=1e-6)
        assert torch.equal(answer[1], label)
        assert torch.equal(answer[2], index)


# ---------------------------------------------------------------------------------------------------------------
# k nearest neighbours


def plain_knn(bank: Features, queries: Features, k: int, temperature: float, num_classes: int) -> list[int]:
    """The definition, one query at a time, in float64."""
    rows = bank.representation.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    answers = []
    for query in queries.representation.double().numpy():
        similarity = rows @ (query / np.linalg.norm(query))
        votes = np.zeros(num_classes)
        for neighbour in np.argsort(-similarity)[:k]:
            votes[bank.label[neighbour]] += math.exp(similarity[neighbour] / temperature)
        answers.append(int(votes.argmax()))
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (200, 0.07)])
def test_knn_equals_the_definition_and_scikit_learn(k: int, temperature: float, dtype: torch.dtype) -> None:
    bank, queries = random_features(300, 12, 5, seed=0, dtype=dtype), random_features(111, 12, 5, seed=1, dtype=dtype)
    predicted = evaluation.knn_predict(bank, queries, k=k, temperature=temperature, num_classes=5)
    assert predicted.tolist() == plain_knn(bank, queries, k, temperature, 5)
    library = library_knn(k, temperature).fit(bank.representation.double().numpy(), bank.label.numpy())
    assert predicted.tolist() == library.predict(queries.representation.double().numpy()).tolist()
    accuracy = evaluation.knn_accuracy(bank, queries, k=k, temperature=temperature, num_classes=5)
    expected = 100 * library.score(queries.representation.double().numpy(), queries.label.numpy())
    assert accuracy == pytest.approx(expected, abs=1e-9)
    assert 30 < accuracy < 100  # neither chance nor trivial, or the comparison would say little


def test_knn_in_blocks_is_knn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = random_features(300, 12, 5, seed=0), random_features(111, 12, 5, seed=1)
    at_once = evaluation.knn_predict(bank, queries, k=20, num_classes=5)
    monkeypatch.setattr(evaluation, "_SIMILARITIES_AT_ONCE", 300 * 7)
    signs_of_life: list[None] = []
    in_blocks = evaluation.knn_predict(
        bank, queries, k=20, num_classes=5, before_block=lambda: signs_of_life.append(None)
    )
    assert torch.equal(in_blocks, at_once)
    assert len(signs_of_life) == 16  # blocks of 7 of 111 queries


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
def test_knn_of_representations_of_any_length(scale: float) -> None:
    bank, queries = random_features(60, 8, 3, seed=1), random_features(40, 8, 3, seed=2)
    scaled = (dataclasses.replace(f, representation=f.representation.float() * scale) for f in (bank, queries))
    expected = evaluation.knn_predict(bank, queries, k=5, num_classes=3)
    assert torch.equal(evaluation.knn_predict(*scaled, k=5, num_classes=3), expected)


def test_knn_weighs_near_neighbours_more() -> None:
    # one neighbour at similarity 1, two at 0.8: exp(10) > 2 exp(8) at temperature 0.1, exp(1) < 2 exp(0.8) at 1
    bank = Features(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]]), torch.tensor([0, 1, 1]), torch.arange(3))
    query = Features(torch.tensor([[5.0, 0.0]]), torch.tensor([0]), torch.arange(1))
    assert evaluation.knn_predict(bank, query, k=3, temperature=0.1, num_classes=2).tolist() == [0]
    assert evaluation.knn_predict(bank, query, k=3, temperature=1.0, num_classes=2).tolist() == [1]


def test_knn_refuses_what_it_cannot_answer() -> None:
    bank, queries = random_features(10, 4, 3, seed=0), random_features(5, 4, 3, seed=1)
    unlabelled = Features(queries.representation, torch.full_like(queries.label, -1), queries.index)
    with pytest.raises(ValueError, match="k is 11, expected 1 to 10"):
        evaluation.knn_predict(bank, queries, k=11, num_classes=3)
    with pytest.raises(ValueError, match="temperature is 0"):
        evaluation.knn_predict(bank, queries, k=1, temperature=0, num_classes=3)
    with pytest.raises(ValueError, match="the bank holds labels from 0 to 2, expected 0 to 1"):
        evaluation.knn_predict(bank, queries, k=1, num_classes=2)
    with pytest.raises(ValueError, match=r"the queries holds labels from -1 to -1.*without a label"):
        evaluation.knn_accuracy(bank, unlabelled, k=1, num_classes=3)
    with pytest.raises(ValueError, match="width 4, the queries' have 5"):
        evaluation.knn_predict(bank, random_features(5, 5, 3, seed=1), k=1, num_classes=3)


# ---------------------------------------------------------------------------------------------------------------
# Frozen


def _change_a_weight(encoder: nn.Module) -> None:
    with torch.no_grad():
        parameter = list(encoder.parameters())[-1]
        parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(9.0))


def _run_a_batch_in_training_mode(encoder: nn.Module) -> None:
    encoder.train()
    encoder(torch.zeros(2, 3, SIDE, SIDE))
    encoder.eval()


def _leave_a_part_in_training_mode(encoder: nn.Module) -> None:
    list(encoder.modules())[-1].train()


def _ask_for_a_gradient(encoder: nn.Module) -> None:
    next(encoder.parameters()).requires_grad_(True)


@pytest.mark.parametrize(
    ("offence", "named"),
    [
        (_change_a_weight, "1 of its weights and buffers changed"),
        (_run_a_batch_in_training_mode, "running_mean"),
        (_leave_a_part_in_training_mode, "in training mode"),
        (_ask_for_a_gradient, "gradients are asked for"),
    ],
)
def test_an_encoder_that_was_touched_is_no_frozen_one(offence: object, named: str) -> None:
    assert callable(offence)
    encoder = an_encoder()
    with pytest.raises(RuntimeError, match=rf"not frozen.*{named}"), evaluation.frozen(encoder):
        offence(encoder)


def test_frozen_gives_modes_and_gradients_back() -> None:
    encoder = an_encoder().train()
    fixed = next(encoder.parameters()).requires_grad_(False)
    with evaluation.frozen(encoder) as sha256:
        assert not any(module.training for module in encoder.modules())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert sha256 == evaluation.combined_sha256(evaluation.fingerprint(encoder))
    assert all(module.training for module in encoder.modules())
    assert [parameter for parameter in encoder.parameters() if not parameter.requires_grad] == [fixed]


def test_the_fingerprint_sees_every_entry_and_its_shape() -> None:
    encoder = an_encoder()
    before = evaluation.fingerprint(encoder)
    assert set(before) == set(encoder.state_dict())
    assert any(name.endswith("running_var") for name in before)
    flat = nn.ParameterDict({"w": nn.Parameter(torch.zeros(4))})
    square = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2, 2))})
    assert evaluation.fingerprint(flat) != evaluation.fingerprint(square)
    assert evaluation.combined_sha256(before) == evaluation.combined_sha256(dict(reversed(before.items())))


# ---------------------------------------------------------------------------------------------------------------
# Linear classifiers

GRID = [Candidate(*pair) for pair in product((0.02, 0.2, 1.0), (0.0, 1e-2))]


def fit(
    train: Features, candidates: list[Candidate], measure: dict[str, Features], epochs: int = 6, batch_size: int = 32
) -> evaluation.LinearFit:
    mean, std = evaluation.standardisation(train)
    batches = evaluation.cached_batches(train, batch_size=batch_size, seed=3)
    return evaluation.fit_linear(batches, candidates, measure, mean=mean, std=std, num_classes=5, epochs=epochs)


@pytest.mark.parametrize("which", range(len(GRID)))
def test_each_of_the_grid_is_what_torchs_own_sgd_makes_of_it(which: int) -> None:
    train, held_out = random_features(200, 12, 5, seed=0), random_features(77, 12, 5, seed=1)
    grid = fit(train, GRID, {"held out": held_out})
    epochs, curve = 6, grid.curves["held out"]
    mean, std = evaluation.standardisation(train)
    layer = nn.Linear(12, 5, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    groups: list[dict[str, Any]] = [
        {"params": [layer.weight], "weight_decay": GRID[which].weight_decay},
        {"params": [layer.bias]},
    ]
    optimizer = torch.optim.SGD(groups, lr=GRID[which].learning_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    batches = evaluation.cached_batches(train, batch_size=32, seed=3)
    for epoch in range(epochs):
        for x, y in batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(layer((x - mean) / std), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            logits = layer((held_out.representation - mean) / std)
        assert curve.loss[epoch, which] == pytest.approx(float(F.cross_entropy(logits, held_out.label)), rel=1e-9)
        right = 100 * float((logits.argmax(1) == held_out.label).double().mean())
        assert curve.accuracy[epoch, which] == pytest.approx(right, abs=1e-9)
    # the standardisation is folded in: the same logits from the plain features
    folded = F.linear(held_out.representation, grid.weight[which], grid.bias[which])
    torch.testing.assert_close(folded, logits, rtol=1e-9, atol=1e-9)


def test_candidates_do_not_influence_each_other() -> None:
    train, held_out = random_features(200, 12, 5, seed=0), random_features(77, 12, 5, seed=1)
    together = fit(train, [*GRID, Candidate(1e308, 0.0)], {"held out": held_out})
    assert not math.isfinite(together.curves["held out"].loss[-1, -1])  # one that diverges among them
    for i, candidate in enumerate(GRID):
        alone = fit(train, [candidate], {"held out": held_out})
        torch.testing.assert_close(together.weight[i], alone.weight[0], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(together.curves["held out"].loss[:, i], alone.curves["held out"].loss[:, 0])


def test_measured_sets_influence_nothing() -> None:
    train, held_out = random_features(200, 12, 5, seed=0), random_features(77, 12, 5, seed=1)
    wrong = dataclasses.replace(held_out, label=held_out.label.flip(0))
    with_it, with_wrong, without = (
        fit(train, GRID, {"a": held_out}),
        fit(train, GRID, {"a": wrong}),
        fit(train, GRID, {}),
    )
    assert torch.equal(with_it.weight, with_wrong.weight)
    assert torch.equal(with_it.weight, without.weight)
    assert not np.array_equal(with_it.curves["a"].loss, with_wrong.curves["a"].loss)


def test_the_optimum_is_scikit_learns() -> None:
    train, held_out = random_features(600, 12, 5, seed=0), random_features(400, 12, 5, seed=1)
    decay = 1e-2
    found = fit(train, [Candidate(0.3, decay)], {"train": train, "held out": held_out}, epochs=200, batch_size=600)
    mean, std = evaluation.standardisation(train)
    # scikit-learn minimises C * sum of losses + |w|^2 / 2, hence C = 1 / (weight decay * images)
    library = LogisticRegression(C=1 / (decay * len(train)), tol=1e-10, max_iter=10_000)
    library.fit(((train.representation - mean) / std).numpy(), train.label.numpy())
    for name, features in (("train", train), ("held out", held_out)):
        x = ((features.representation - mean) / std).numpy()
        probability = library.predict_proba(x)[np.arange(len(x)), features.label.numpy()]
        assert found.curves[name].loss[-1, 0] == pytest.approx(-np.log(probability).mean(), abs=1e-4)
        assert found.curves[name].accuracy[-1, 0] == pytest.approx(
            100 * library.score(x, features.label.numpy()), abs=0.3
        )


def test_each_epoch_has_its_own_order_and_every_image_once() -> None:
    train = random_features(50, 4, 3, seed=0)
    batches = evaluation.cached_batches(train, batch_size=16, seed=0)
    first, second = (torch.cat([x[:, 0] for x, _ in batches(epoch)]) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, train.representation[:, 0].sort().values)
    assert torch.equal(first, torch.cat([x[:, 0] for x, _ in batches(0)]))


def test_a_constant_feature_is_harmless() -> None:
    train = random_features(50, 4, 3, seed=0, dtype=torch.float32)
    train.representation[:, 2] = 0.1
    train.representation[:, 3] = 0.0
    mean, std = evaluation.standardisation(train)
    assert std[2:].tolist() == [1, 1]
    np.testing.assert_allclose(std[:2], train.representation[:, :2].double().std(0, correction=0), rtol=1e-6)
    np.testing.assert_allclose(mean, train.representation.double().mean(0), rtol=1e-6)
    found = fit(train, [Candidate(0.1, 0.0)], {"train": train})
    assert np.isfinite(found.curves["train"].loss).all()


def curve(accuracy: list[float], loss: list[float]) -> Curve:
    return Curve(np.array([[0.0] * len(loss), loss]), np.array([[100.0, *[0.0] * (len(loss) - 1)], accuracy]))


def test_the_choice_is_the_last_epochs_and_ties_are_decided() -> None:
    candidates = [Candidate(rate, 0.0) for rate in (0.1, 0.2, 0.3)]
    assert evaluation.choose(candidates, curve([50, 60, 55], [1, 1, 1])) == 1
    assert evaluation.choose(candidates, curve([60, 60, 55], [1.2, 1.1, 1])) == 1
    assert evaluation.choose(candidates, curve([55, 60, 60], [1, 1.1, 1.1])) == 1
    assert evaluation.choose(candidates, curve([50, 99, 98], [1, math.nan, math.inf])) == 0
    with pytest.raises(ValueError, match=r"every candidate diverged; try learning rates below 0\.1"):
        evaluation.choose(candidates, curve([50, 99, 98], [math.nan, math.nan, math.inf]))


def test_no_candidates_and_labels_out_of_range_are_refused() -> None:
    train = random_features(50, 4, 3, seed=0)
    with pytest.raises(ValueError, match="no candidates"):
        fit(train, [], {})
    with pytest.raises(ValueError, match="held out holds labels from 0 to 6, expected 0 to 4"):
        fit(train, GRID, {"held out": random_features(50, 4, 7, seed=0)})


def test_augmented_features_are_of_new_views_in_each_epoch(source: ImageSource) -> None:
    encoder, indices = an_encoder().eval(), np.arange(20)
    config = ProbeConfig(Path("run"), view=FLIP_AND_CROP, batch_size=8, seed=4, precision="fp32")
    batches = evaluation.augmented_batches(encoder, source, indices, config, normalisation=NORMALISATION, device="cpu")
    images, labels = beton.read(source.path)
    first, label = (torch.cat(parts) for parts in zip(*batches(0), strict=True))
    assert sorted(label.tolist()) == sorted(labels[indices].tolist())
    # the views that the hash draws for these images, whatever the order
    parameters = sample_parameters(FLIP_AND_CROP, indices, seed=4, epoch=0, view=0, height=SIDE, width=SIDE)
    mean, std = NORMALISATION
    views = apply_view(torch.from_numpy(images[indices]), parameters, FLIP_AND_CROP, size=SIDE, mean=mean, std=std)
    with torch.no_grad():
        expected = encoder(views)
    distance = torch.cdist(first, expected)
    assert float(distance.min(dim=1).values.max()) < 1e-4
    assert sorted(distance.argmin(dim=1).tolist()) == list(range(20))
    second = torch.cat([x for x, _ in batches(1)])
    assert float(torch.cdist(second, expected).min(dim=1).values.max()) > 1e-2
    assert torch.equal(first, torch.cat([x for x, _ in batches(0)]))


# ---------------------------------------------------------------------------------------------------------------
# The whole classifier


def save(path: Path, classifier: Classifier, facts: beton.Facts) -> None:
    checkpoint.save_classifier(
        path,
        classifier,
        pretraining=TrainConfig(model=ModelConfig(encoder="small_resnet_w8")),
        pretraining_facts=facts,
        probe=ProbeConfig(run=Path("results/a")),
    )


def a_classifier(facts: beton.Facts) -> Classifier:
    torch.manual_seed(8)
    return Classifier(an_encoder(), nn.Linear(WIDTH, 4), facts.normalisation, facts.classes).eval()


def test_a_saved_classifier_classifies_stored_pixels_as_before(source: ImageSource, tmp_path: Path) -> None:
    classifier = a_classifier(source.facts)
    save(tmp_path / checkpoint.CLASSIFIER, classifier, source.facts)
    loaded = checkpoint.load_classifier(str(tmp_path))
    assert not loaded.training
    assert loaded.classes == source.facts.classes
    images = torch.from_numpy(beton.read(source.path)[0])
    with torch.no_grad():
        logits = loaded(images)
        assert logits.shape == (NUM_IMAGES, 4)
        assert torch.equal(logits, classifier(images))
        features = evaluation.extract_features(classifier.encoder, source, np.arange(NUM_IMAGES))
        torch.testing.assert_close(logits, classifier.head(features.representation))
    assert torch.equal(evaluation.head_predict(loaded.head, features), logits.argmax(dim=1))


def test_what_is_no_classifier_is_refused(source: ImageSource, tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint at"):
        checkpoint.load_classifier(tmp_path)
    path = tmp_path / checkpoint.CLASSIFIER
    save(path, a_classifier(source.facts), source.facts)
    payload = checkpoint.load_safely(path)
    checkpoint.save_atomically(path, payload | {"kind": "model"})
    with pytest.raises(checkpoint.CheckpointError, match="'model', not a classifier"):
        checkpoint.load_classifier(path)
    del payload["model"]["encoder.bn1.running_mean"]
    checkpoint.save_atomically(path, payload)
    with pytest.raises(checkpoint.CheckpointError, match=r"bn1\.running_mean"):
        checkpoint.load_classifier(path)


def tune(
    encoder: nn.Module, source: ImageSource, rate: float = 0.05, epochs: int = 4, **changes: object
) -> tuple[Classifier, dict[str, Curve]]:
    indices = np.arange(40)
    settings: dict[str, object] = {"epochs": epochs, "batch_size": 10, "view": FLIP_AND_CROP, **changes}
    config = dataclasses.replace(ProbeConfig(run=Path("results/a"), mode="finetune"), **settings)  # type: ignore[arg-type]
    return evaluation.fine_tune(
        encoder,
        source,
        indices,
        Candidate(rate, 5e-4),
        {"train": (source, indices), "held out": (source, np.arange(40, NUM_IMAGES))},
        width=WIDTH,
        normalisation=NORMALISATION,
        config=config,
    )


def test_fine_tuning_trains_a_copy_of_encoder_and_head_together(source: ImageSource) -> None:
    encoder = an_encoder()
    before = evaluation.fingerprint(encoder)
    classifier, curves = tune(encoder, source, epochs=12)
    assert evaluation.fingerprint(encoder) == before
    after = evaluation.fingerprint(classifier.encoder)
    assert all(after[name] != before[name] for name in before)  # weights, and running statistics too
    assert not any(module.training for module in classifier.modules())
    assert curves["train"].loss.shape == (12, 1)
    assert curves["train"].loss[-1, 0] < curves["train"].loss[0, 0] < math.log(4) + 0.2
    assert curves["held out"].accuracy[-1, 0] > 50  # chance: 25
    # the curves' last entries are those of the classifier that is returned
    images, labels = (torch.from_numpy(array) for array in beton.read(source.path))
    with torch.no_grad():
        logits = classifier(images[40:])
    assert curves["held out"].loss[-1, 0] == pytest.approx(float(F.cross_entropy(logits, labels[40:])), rel=1e-4)


def test_fine_tuning_is_repeatable_and_follows_its_seed(source: ImageSource) -> None:
    encoder = an_encoder()
    first, again, other = (tune(encoder, source, epochs=1, seed=seed)[0] for seed in (0, 0, 1))
    assert evaluation.fingerprint(first) == evaluation.fingerprint(again)
    assert evaluation.fingerprint(first) != evaluation.fingerprint(other)


def test_fine_tuning_that_diverges_says_so_in_its_curve(source: ImageSource) -> None:
    _, curves = tune(an_encoder(), source, rate=1e20, epochs=2)
    assert math.isnan(curves["held out"].loss[-1, 0])
