"""Code sent to child processes that may crash or hang without harm."""
