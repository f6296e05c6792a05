"""What happened in a run: the journal is the truth, the terminal, W&B and the page are read from it."""
