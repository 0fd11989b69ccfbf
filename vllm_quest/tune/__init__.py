"""What sparsity and 4-bit pages cost in quality, measured in decode through the real engine."""
