"""Evaluation: what a fine-tuned model is worth, protocol-exact."""
