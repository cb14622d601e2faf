"""Training and evaluating from files, as the command line does."""
