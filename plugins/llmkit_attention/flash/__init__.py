"""Paged attention in Triton kernels: scatter of new keys and values, split decode, tiled prefill."""
