"""The runtimes, each behind the Target protocol."""
