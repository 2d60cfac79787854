"""The same results, sooner or in less memory.

Everything here computes what the modules above it compute, up to rounding, and imports them. They know two of its
doors: ``losses.nt_xent`` may take :mod:`simclr.fast.tiled`, and ``data.open_images`` may take
:mod:`simclr.fast.ffcv_source`. Whoever leaves this folder unread has missed nothing of what is computed.
"""
