"""The data of a task: how it is read, checked, divided, and what of it is no new evidence."""
