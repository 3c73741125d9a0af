"""Prompts as people write them, their encoding, textual inversions. Knows nothing of pictures."""
