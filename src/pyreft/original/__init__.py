"""What callers of pyreft 0.1.0 write: its calls, its locations and its data sets."""
