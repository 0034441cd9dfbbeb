# Cross compilation with Debian's g++-aarch64-linux-gnu; Python's headers are those of the building
# Python, which do not differ between 64-bit Linux processors.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
