// Compiles the including unit (HWY_TARGET_INCLUDE) once for each instruction set. Before any header that needs Highway.
#pragma once

#include "kernels/cpu/targets.h"  // the choice comes first

#include "hwy/foreach_target.h"
