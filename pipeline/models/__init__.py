"""Networks: plain nn.Modules, built from keyword arguments, with shapes in comments.

Only what transformers and diffusers do not have gets a file here. architectures.py builds theirs from options or from a
pretrained folder, norm.py changes their normalisation, flops.py counts what a sample costs. Of our own are lstm.py
(a language model), convnet.py (plain or residual), denoisers.py (for diffusion), recurrent.py, which hears what
log_mel.py makes of sound. generation.py and writing.py let language models write, documents.py keeps documents apart.
"""
