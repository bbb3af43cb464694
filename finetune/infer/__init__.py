"""Answers from a trained model, through the same quantized experts that trained it."""
