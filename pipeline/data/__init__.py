"""Data: tar shards -> index -> order -> samples -> micro batches. Each file is one step of that way.

pack/ makes shards of raw files; remote/ reads them at a URL.
"""
