"""What is asked of the engine, and when: requests with scheduled arrivals, and the loop that plays them. Torch-free."""
