"""Data: from text to the token ids, labels and locations that training needs."""
