"""What a GPU is asked, in order of worth and in eight minutes; ``python -m benchmarks.gpu`` runs it."""
