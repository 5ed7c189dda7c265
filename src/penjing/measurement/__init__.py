"""Quality, latency, memory, size and operations of an artefact."""
