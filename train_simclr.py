"""Pretraining; under construction."""
