// All policies: the headers that loss_list.def includes.
#pragma once

#include "unitsface/loss_list.def"
