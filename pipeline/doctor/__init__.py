"""What would fail, not fit, starve or never learn, said before a run leaves: `examine.py` asks all the others."""
