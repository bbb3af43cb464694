"""Conversations with a trained model, in the terminal and on a page: faces of the engine (`finetune/infer`)."""
