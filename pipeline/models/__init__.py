"""Networks: plain nn.Modules, built from keyword arguments, with shapes in comments.

Only what transformers and diffusers do not have gets a file here. architectures.py builds theirs from options or from a
pretrained folder, norm.py changes their normalisation, flops.py counts what a sample costs. recurrent.py is a network
of our own, and log_mel.py what it hears.
"""
