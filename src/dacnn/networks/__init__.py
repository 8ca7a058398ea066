"""Plans, and the networks built from them."""
