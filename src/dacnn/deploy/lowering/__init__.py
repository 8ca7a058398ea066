"""From a `torch.export` graph to the steps of a Program."""
