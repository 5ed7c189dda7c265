"""Jobs that train models: one run, searches for a strategy, stability, students."""
