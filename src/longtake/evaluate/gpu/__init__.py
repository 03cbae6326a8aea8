"""`longtake bench gpu`: what the published models' forwards, chunks, kernels and graphs take on one GPU."""
