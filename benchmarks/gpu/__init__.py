"""What needs a GPU, in pieces of at most ten minutes; ``python -m benchmarks.gpu`` runs them in order."""
