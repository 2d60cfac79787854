"""What a GPU is asked, in order of worth, in a few minutes each; ``python -m benchmarks.gpu`` runs it."""
