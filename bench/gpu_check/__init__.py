"""All checks that need a CUDA machine, as stages of one command: ``python -m bench.gpu_check``.

This process and the modules that it imports need the standard library alone, so that a broken
Torch is a result and not the end. A stage is one or more programs of their own, each with a limit;
those that measure write JSON as they go, which is copied into the results at once.
"""
