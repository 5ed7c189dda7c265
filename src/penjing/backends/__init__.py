"""The frameworks, each behind the Backend protocol."""
