"""`millstream init`: a folder of data looked at (folder.py), and a first configuration for it (template.py)."""
