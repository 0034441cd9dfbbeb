// Every PTX wrapper of the fused kernels. In the emulation, csrc/cuda/emulation has functions of
// the same names, which abort where a rule of the PTX ISA is broken.
#pragma once

#include "mutations.h"
#include "ptx_sm80.cuh"
