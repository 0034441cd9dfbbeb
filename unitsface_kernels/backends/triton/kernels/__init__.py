"""The Triton kernels. Importing them needs triton; no module outside this backend does."""
