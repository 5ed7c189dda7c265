"""A float graph in integers: where quantizers go, their ranges, and the operators that state them."""
