"""The compiled kernels, where they could be built; nothing here needs them."""
