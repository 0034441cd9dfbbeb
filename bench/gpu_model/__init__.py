"""Cost of the GPU kernels and steps, counted from what is compiled; needs no GPU."""
