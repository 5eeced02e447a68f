"""Voxel features as a product: extracted from scans, shown as colours, and measured."""
