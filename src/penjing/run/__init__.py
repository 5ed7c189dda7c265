"""The run directory: files, ledger, processes."""
