"""Training: an endless stream of synthetic images (stream.py), losses, and one plain loop (loop.py)."""
