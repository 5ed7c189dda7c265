"""Layer by layer over a model with data at hand: order, inputs, and methods that solve one at a time."""
