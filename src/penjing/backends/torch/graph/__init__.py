"""The graph of a module: captured, and walked by the rules of its operators."""
