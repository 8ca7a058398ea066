"""What runs the steps of a Program in PyTorch, on kernels packed once."""
