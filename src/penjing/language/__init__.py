"""Language models quantized from their checkpoints, one block in memory at a time."""
