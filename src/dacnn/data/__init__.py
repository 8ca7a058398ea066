"""Data sets: found, checked, split, decoded, augmented."""
