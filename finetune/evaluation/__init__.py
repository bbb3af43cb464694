"""`finetune evaluate`: how good models are on held-out conversations, and how far they are from a reference."""
