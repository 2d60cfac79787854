"""Exact distributed contrastive pretraining: SimCLR and Barlow Twins, the same run on 1 or N devices."""

__version__ = "0.1.0"
