"""The model card of an exported encoder: the README.md that the Hugging Face hub shows, from the run's own records.

``model_card.jinja`` is the text. Its numbers are those of the run's manifest and of each probe.json beside the
checkpoint that was measured on these very weights; where none was, it says so. Each of its Python lines runs, in the
folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from simclr import templates
from simclr.evaluation import combined_sha256, fingerprint
from simclr.export.timm_alone import TimmAlone
from simclr.run import runlog
from simclr.run.checkpoint import Pretrained
from simclr.views import describe, say_view_stages

_METHODS = {"nt_xent": "SimCLR (NT-Xent)", "barlow_twins": "Barlow Twins"}
_TAGS = {"nt_xent": "simclr", "barlow_twins": "barlow-twins"}
_PAPERS = {"nt_xent": "2002.05709", "barlow_twins": "2103.03230"}


@dataclass(frozen=True)
class Measured:
    """What one evaluation found, of these weights."""

    folder: str
    found: Mapping[str, Any]
    """probe.json."""

    @property
    def classifier(self) -> str:
        """What stands on the encoder."""
        config = self.found["config"]
        if config["mode"] == "finetune":
            return "encoder fine-tuned with a linear classifier"
        views = "plain" if config["features"] == "cached" else "lightly augmented"
        return f"linear classifier on the frozen encoder's features of {views} images"

    @property
    def own(self) -> Mapping[str, Any]:
        """The pretrained encoder's row."""
        row: Mapping[str, Any] = self.found["rows"][-1]
        return row

    @property
    def read_at(self) -> int | None:
        """Side in pixels that images were resized to for the encoder; None if they were read as stored."""
        read_at: int | None = self.own["image_size"]
        return None if read_at == self.found["test_facts"]["height"] else read_at


def render(
    pretrained: Pretrained,
    *,
    alone: TimmAlone | None,
    files: Sequence[str],
    config: Mapping[str, Any],
    license_id: str | None = None,
) -> str:
    """Return the card.

    Args:
        pretrained: What is exported.
        alone: How timm builds it; None if it does not.
        files: Names of the files beside the card.
        config: What config.json holds.
        license_id: As the hub writes it.
    """
    run = pretrained.path.parent
    probes: list[Measured] = []
    others: list[Measured] = []
    for path, found in runlog.read_results(run):
        probe = Measured(path.parent.name, found)
        (probes if _is_of(probe, pretrained) else others).append(probe)
    return templates.render(
        Path(__file__).with_name("model_card.jinja"),
        {},
        alone=alone,
        files=files,
        about=config["simclr"],
        pretrained=pretrained,
        config=pretrained.config,
        facts=pretrained.facts,
        front_matter=_front_matter(pretrained, probes, alone, license_id).to_yaml(),
        method=_METHODS.get(pretrained.config.loss.name, f"the objective {pretrained.config.loss.name}, of its own"),
        paper=_PAPERS.get(pretrained.config.loss.name),
        parameters=sum(parameter.numel() for parameter in pretrained.model.encoder.parameters()),
        probes=probes,
        others=others,
        manifest=runlog.read_manifest(run),
        describe=describe,
        view_stages=say_view_stages(pretrained.config.view_stages, pretrained.facts.height, pretrained.config.epochs),
    )


def _is_of(probe: Measured, pretrained: Pretrained) -> bool:
    """Whether an evaluation measured these weights: by their SHA-256; one that trained them further, by their step."""
    sha256 = probe.found["encoder_sha256"]
    if sha256 is None:
        return bool(probe.found["pretraining_step"] == pretrained.step)
    return bool(sha256 == combined_sha256(fingerprint(pretrained.model.encoder)))


def _front_matter(
    pretrained: Pretrained, probes: Sequence[Measured], alone: TimmAlone | None, license_id: str | None
) -> ModelCardData:
    """Return what the hub reads: tags, library, and the results of the test images."""
    objective = pretrained.config.loss.name
    builds_by_name = alone is not None and alone.call is not None
    return ModelCardData(
        license=license_id,
        library_name="timm" if builds_by_name else None,
        pipeline_tag="image-feature-extraction",
        tags=[
            *(["timm"] if alone is not None else []),
            *([_TAGS[objective], f"arxiv:{_PAPERS[objective]}"] if objective in _PAPERS else []),
            "self-supervised-learning",
            "contrastive-learning",
        ],
        model_name=pretrained.config.name if probes else None,
        eval_results=[result for probe in probes for result in _results(probe)] or None,
    )


def _results(probe: Measured) -> Iterator[EvalResult]:
    """Yield test accuracies; the hub wants a name of the data set, and has an identifier for some."""
    facts = probe.found["test_facts"]
    source, split = facts["source"], facts["split"]
    known = re.match(r"CIFAR-100?\b|STL-10\b", source)
    identifier = known[0].lower().replace("-", "") if known else "imagefolder"
    numbers = {f"kNN (k = {probe.found['config']['knn_neighbours']})": probe.own["knn_test"]}
    if probe.own["classifier"] is not None:
        numbers[probe.classifier] = probe.own["classifier"]["test"]
    for name, value in numbers.items():
        yield EvalResult(
            task_type="image-classification",
            dataset_type=identifier,
            dataset_name=source,
            dataset_split=split,
            metric_type="accuracy",
            metric_name=f"{name}, accuracy in %",
            metric_value=round(value, 2),
        )
