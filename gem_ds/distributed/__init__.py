"""The doors to DeepSpeed and torch.distributed."""
