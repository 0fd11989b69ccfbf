"""What sparsity and 4-bit pages cost in quality, measured where it arises: in decode, through the real engine."""
