"""Runs sent to a cluster: Ray jobs, Slurm, Kubernetes. `submit.py` is the way; the others are what it sends to."""
