"""The model card of an exported encoder: the README.md that the Hugging Face hub shows, from the run's own records.

``model_card.jinja`` is the text. Its numbers are those of the run's manifest and of each probe.json beside the
checkpoint that was measured on these very weights; where none was, it says so. Each of its Python lines runs, in the
folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from simclr import templates
from simclr.evaluation import combined_sha256, fingerprint
from simclr.export.timm_alone import TimmAlone
from simclr.run import runlog
from simclr.run.checkpoint import Pretrained
from simclr.views import describe, say_view_stages

# By objective: the method, its tag, its paper
_METHODS = {
    "nt_xent": ("SimCLR (NT-Xent)", "simclr", "2002.05709"),
    "barlow_twins": ("Barlow Twins", "barlow-twins", "2103.03230"),
}


def render(
    pretrained: Pretrained,
    *,
    alone: TimmAlone | None,
    files: Sequence[str],
    about: Mapping[str, Any],
    license_id: str | None = None,
) -> str:
    """Return the card.

    Args:
        pretrained: What is exported.
        alone: How timm builds it; None if it does not.
        files: Names of the files beside the card.
        about: What config.json holds under "simclr".
        license_id: As the hub writes it.
    """
    run, objective = pretrained.path.parent, pretrained.config.loss.name
    method, tag, paper = _METHODS.get(objective, (f"the objective {objective}, of its own", None, None))
    results = [(path.parent.name, found) for path, found in runlog.read_results(run)]
    sha256 = combined_sha256(fingerprint(pretrained.model.encoder))
    # One that trained the weights further has no SHA-256 of them: it is known by their step.
    own = {name for name, found in results if found["encoder_sha256"] == sha256} | {
        name
        for name, found in results
        if found["encoder_sha256"] is None and found["pretraining_step"] == pretrained.step
    }
    front_matter = ModelCardData(
        license=license_id,
        library_name="timm" if alone is not None and alone.call is not None else None,
        pipeline_tag="image-feature-extraction",
        tags=[
            *(["timm"] if alone is not None else []),
            *([tag, f"arxiv:{paper}"] if tag is not None else []),
            "self-supervised-learning",
            "contrastive-learning",
        ],
    )
    return templates.render(
        Path(__file__).with_name("model_card.jinja"),
        {},
        alone=alone,
        files=files,
        about=about,
        pretrained=pretrained,
        config=pretrained.config,
        facts=pretrained.facts,
        front_matter=front_matter.to_yaml(),
        method=method,
        paper=paper,
        parameters=sum(parameter.numel() for parameter in pretrained.model.encoder.parameters()),
        probes=[found for name, found in results if name in own],
        others=[name for name, _ in results if name not in own],
        manifest=runlog.read_manifest(run),
        describe=describe,
        view_stages=say_view_stages(pretrained.config.view_stages, pretrained.facts.height, pretrained.config.epochs),
    )
