"""Training: the loop and the methods that fine-tune."""
