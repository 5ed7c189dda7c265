"""What a model and a machine are, before anything is changed."""
