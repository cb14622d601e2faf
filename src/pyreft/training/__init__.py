"""Training: the Hugging Face Trainer for adapted models."""
