"""Shards at a URL: fetched in pieces in the known order, kept on the disk of a node, and foretold before a run."""
