"""A Program in integers: calibrated, quantised, run."""
