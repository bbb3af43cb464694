"""What this repository measures of itself, from a checkout: `python -m bench NAME`; the records lie in results/."""
