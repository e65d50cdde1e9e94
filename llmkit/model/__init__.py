"""Loading any transformers causal LM and running it packed: architecture checks, weights, forward pass, sampling."""
