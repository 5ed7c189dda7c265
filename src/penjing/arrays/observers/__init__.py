"""Ranges of values over batches, in bounded memory."""
