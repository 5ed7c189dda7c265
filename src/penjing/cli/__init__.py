"""The command line: verbs in files by what they do."""
