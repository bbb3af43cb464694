"""One run, from its recipe to its adapter: the story (run.py), the trainer, what ends it, and where it logs."""
