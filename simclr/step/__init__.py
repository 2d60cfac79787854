"""How a step is computed and taken: launch by launch or as one graph, in less memory, never with what is not finite."""
