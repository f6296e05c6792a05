"""Data: tar shards -> index -> order -> samples -> micro batches. Each file is one step of that way."""
