// All policies. A new loss adds one line here and one in loss_list.def.
#pragma once

#include "losses/margin_softmax.h"
#include "losses/pair_logsumexp.h"
#include "losses/pair_softmax.h"
#include "losses/sphereface2.h"
#include "losses/uce.h"
#include "losses/uss.h"
