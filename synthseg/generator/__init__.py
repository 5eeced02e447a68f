"""The generator: label templates in, randomised images and targets out. Read plan.py, then synthesis.py."""
