"""``python -m simclr.export``."""

from simclr.export import cli

cli()
