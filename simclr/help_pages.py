"""`--help` in pages that a person reads: everyday options first, the others by section, each with its value.

    python train_simclr.py demo --help            # everyday options, and which sections there are
    python train_simclr.py demo --help views      # one section
    python train_simclr.py demo --help all

An option is shown as it is typed to get the value that it has anyway. What it means is read from the texts under the
fields of the dataclasses, so it stands in one place. The options themselves are read by tyro.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import shlex
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from tyro.conf import OmitArgPrefixes, Suppress

ALL = "all"
_FLAGS = ("--help", "-h")
_MOST_COLUMNS = 110  # longer lines are hard to follow
_FEWEST_COLUMNS = 40


class Option(NamedTuple):
    """An option of the command line."""

    path: str
    """Of its field, such as loss.temperature."""
    flag: str
    """Such as --loss.temperature."""
    value: Any
    text: str
    """What it means."""
    choices: tuple[str, ...] = ()
    """Those of its type that the text does not name."""

    @property
    def words(self) -> list[str]:
        """Return the words that give it the value that it has."""
        if isinstance(self.value, bool):
            before, dot, name = self.flag[2:].rpartition(".")
            return [self.flag if self.value else f"--{before}{dot}no-{name}"]
        return [self.flag, *_words(self.value)]

    @property
    def shown(self) -> str:
        """Return the words for people, with numbers that are short."""
        if self.value in ((), dataclasses.MISSING):
            return f"{self.flag} ..."
        return shlex.join([self.words[0], *(_words(self.value, digits=4) if len(self.words) > 1 else [])])

    def told(self, *, in_short: bool) -> str:
        """Return what it means, in short by the first sentence and the default; and the values that are possible."""
        first, *others = re.split(r"(?<=\.)\s", self.text)
        text = " ".join([first, *(one for one in others if not in_short or one.startswith("Default: "))])
        required = "Required. " if self.value is dataclasses.MISSING else ""
        return f"{required}{text} {', '.join(self.choices)}{'.' * bool(self.choices)}".strip()


class Section(NamedTuple):
    """A page of options."""

    name: str
    about: str
    paths: tuple[str, ...]
    """Fields, or dataclasses, which stand for all their fields."""
    twins: tuple[str, str] | None = None
    """Two dataclasses of a kind; of the second, what is as in the first is not shown."""

    def options(self, options: Sequence[Option]) -> list[Option]:
        """Return the options of this page, in its order."""
        return [
            option
            for path in self.paths
            for option in options
            if option.path == path or option.path.startswith(f"{path}.")
        ]


def asked_for(words: Sequence[str]) -> str | None:
    """Return the section that the words of a command line ask help about, "" if they name none; None: no help."""
    for i, word in enumerate(words):
        if word in _FLAGS:
            follows = words[i + 1 : i + 2]
            return follows[0] if follows and not follows[0].startswith("-") else ""
    return None


def options_of(config: Any) -> list[Option]:
    """Return all options of a dataclass in the order of its fields.

    Args:
        config: An instance, whose values they have; or the class, for its defaults (dataclasses.MISSING for none).
    """
    return list(_walk(config if isinstance(config, type) else type(config), config, "", "--"))


def page(
    command: str,
    config: Any,
    sections: Sequence[Section],
    name: str = "",
    *,
    about: str = "",
    more: Sequence[tuple[str, str]] = (),
) -> str:
    """Return a page of help.

    Args:
        command: What is typed before the options.
        config: As :func:`options_of` takes it.
        sections: All pages; the first is the everyday one.
        name: Of a section; :data:`ALL`; or empty for the everyday options and the names of the other sections.
        about: What the everyday page begins with.
        more: Options that are no fields, and what they mean, for the everyday page.

    Raises:
        ValueError: If there is no such section.
    """
    options, others = options_of(config), sections[1:]
    names = [section.name for section in others]
    if name not in {"", ALL, *names}:
        raise ValueError(f"--help {name}: there is no such page; there are {', '.join([*names, ALL])}")
    if name:
        return "\n".join(_block(section, options) for section in others if name in {section.name, ALL})
    pages = [(f"--help {section.name}", section.about) for section in others]
    return "\n".join(
        [
            f"usage: {command} [options]\n",
            *([f"{paragraphs(about)}\n"] if about else []),
            _block(sections[0], options, in_short=True),
            "More:",
            table([*more, *pages, (f"--help {ALL}", f"All {len(options)} options.")]),
        ]
    )


def paragraphs(text: str) -> str:
    """Return a text in lines as :func:`wrapped` makes them; indented paragraphs stay as they are."""
    parts = [part.strip("\n") for part in re.split(r"\n\s*\n", text.strip())]
    return "\n\n".join(part if part.startswith(" ") else wrapped(part) for part in parts)


def wrapped(text: str) -> str:
    """Return a paragraph in lines as long as the terminal's, or as is good to read."""
    return textwrap.fill(text, _columns(), break_on_hyphens=False)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return names with what they stand for."""
    width = max(len(name) for name, _ in rows) + 4
    return "\n".join(_row(f"  {name}", text, width) for name, text in rows)


@functools.cache
def texts_of(kind: type) -> dict[str, str]:
    """Return what is written about each field of a dataclass: under it, or under "Attributes:" in the class's text."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    texts = _attributes(inspect.getdoc(kind) or "")
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            texts[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return texts


def _attributes(doc: str) -> dict[str, str]:
    _, _, after = doc.partition("\nAttributes:\n")
    texts: dict[str, str] = {}
    name = ""
    for line in after.split("\n\n")[0].splitlines():
        if not line.startswith(" " * 5):
            name, _, line = line.strip().partition(": ")
        texts[name] = f"{texts.get(name, '')} {line.strip()}".strip()
    return texts


def _walk(kind: type, values: Any, path: str, prefix: str) -> Iterator[Option]:
    hints, texts = typing.get_type_hints(kind, include_extras=True), texts_of(kind)
    for field in dataclasses.fields(kind):
        marks = getattr(hints[field.name], "__metadata__", ())
        bare = hints[field.name].__origin__ if marks else hints[field.name]
        value = _default(field) if isinstance(values, type) else getattr(values, field.name)
        flag = f"{prefix}{field.name.replace('_', '-')}"
        if any(mark is Suppress for mark in marks):
            continue
        if dataclasses.is_dataclass(bare):
            below = prefix if any(mark is OmitArgPrefixes for mark in marks) else f"{flag}."
            yield from _walk(typing.cast(type, bare), value, f"{path}{field.name}.", below)
        else:
            text, choices = texts.get(field.name, "").replace("``", ""), _choices(bare)
            is_told = all(re.search(rf"\b{re.escape(choice)}\b", text) for choice in choices)
            yield Option(f"{path}{field.name}", flag, value, text, () if is_told else choices)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _choices(kind: Any) -> tuple[str, ...]:
    if typing.get_origin(kind) in {typing.Union, types.UnionType}:
        return tuple(choice for part in typing.get_args(kind) for choice in _choices(part))
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _words(value: Any, digits: int = 17) -> list[str]:
    if isinstance(value, tuple):
        return [word for part in value for word in _words(part, digits)]
    return [f"{value:.{digits}g}" if isinstance(value, float) else str(value)]


def _columns() -> int:
    return max(_FEWEST_COLUMNS, min(shutil.get_terminal_size().columns, _MOST_COLUMNS) - 1)


def _block(section: Section, options: Sequence[Option], *, in_short: bool = False) -> str:
    width, shown, end = _columns() * 2 // 5, section.options(options), []
    if section.twins is not None:
        first, second = section.twins
        values = {option.path: option.value for option in shown}
        shown = [
            option
            for option in shown
            if not option.path.startswith(f"{second}.") or option.value != values[option.path.replace(second, first, 1)]
        ]
        flag = second.replace("_", "-")
        end = [_row(f"  --{flag}...", f"The same options; those not shown are as in {first.replace('_', ' ')}.", width)]
    rows = [_row(f"  {option.shown}", option.told(in_short=in_short), width) for option in shown]
    return "\n".join([wrapped(section.about), *rows, *end, ""])


def _row(left: str, text: str, width: int) -> str:
    """Text beside what it is about, or below it where that is too long."""
    lines = textwrap.wrap(text, _columns() - width, break_on_hyphens=False)
    if len(left) > width - 2:
        return "\n".join([left, *(" " * width + line for line in lines)])
    return "\n".join(
        [f"{left:<{width}}{lines[0] if lines else ''}".rstrip(), *(" " * width + line for line in lines[1:])]
    )
