"""What `study.py` is made of: its tasks and adapters, their training, what their rows say, and the picture."""
