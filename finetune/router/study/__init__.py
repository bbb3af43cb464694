"""A router studied after the run: how far it drifted, what its experts like, and the page that shows it."""
