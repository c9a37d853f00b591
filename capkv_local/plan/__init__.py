"""What fits into a memory, and what to take, before anything of a model is loaded."""
