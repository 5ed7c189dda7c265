"""A captured graph as data, and a module made from it again."""
