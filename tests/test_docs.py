"""Pages lead somewhere: links to files that exist, options that exist, every page found from the index."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from simclr.command_line import parse_probe_config, parse_train_config
from tests.helpers import ROOT

INDEX = ROOT / "docs" / "README.md"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])


def links(page: Path) -> Iterator[Path]:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            yield page.parent / target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    assert [str(link) for link in links(page) if not link.exists()] == []


def test_every_page_is_found_from_the_index() -> None:
    pages = {path.resolve() for path in ROOT.glob("docs/*.md")} - {INDEX}
    assert pages - {link.resolve() for link in links(INDEX)} == set()


@pytest.mark.parametrize("page", ["docs/README.md", "docs/assignment.md", "docs/larger_images.md"])
def test_commands_are_understood(page: str) -> None:
    """Each command of training and of the probe is read as it stands, placeholders aside."""
    text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text(encoding="utf-8"))
    commands = re.findall(r"(?:    |`)[^`\n]*?((?:train_simclr|linear_probe)\.py [^`\n]*)", text)
    assert len(commands) > 3
    for command in commands:
        program, *words = shlex.split(command.replace("PRESET", "demo").replace("RUN", "results/x"), comments=True)
        if "--help" in words:
            with pytest.raises(SystemExit) as ended:
                (parse_probe_config if program == "linear_probe.py" else parse_train_config)(words)
            assert ended.value.code == 0, command
        elif program == "linear_probe.py":
            assert parse_probe_config(words).run
        elif "--config" not in words:
            assert parse_train_config([word for word in words if word != "--dry-run"])
