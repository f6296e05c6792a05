"""Networks: plain nn.Modules, built from keyword arguments, with shapes in comments.

Only what transformers and diffusers do not have gets a file here. architectures.py builds theirs from options or from a
pretrained folder, norm.py changes their normalisation, flops.py counts what a sample costs. lstm.py is a language model
of our own; generation.py and writing.py let any of them write, documents.py keeps documents in a row apart.
"""
