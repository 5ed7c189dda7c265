"""How the loss depends on weights, outputs and gates: gradients by example and second derivatives."""
