/** @file
 * lemo: token elimination for long-context fine-tuning. Includes the header of every operation. */
#ifndef LEMO_LEMO_H
#define LEMO_LEMO_H

#include "lemo/attention.h"
#include "lemo/elementwise.h"
#include "lemo/loss.h"
#include "lemo/predict.h"
#include "lemo/rows.h"
#include "lemo/scores.h"
#include "lemo/select.h"
#include "lemo/tiles.h"
#include "lemo/types.h"

#endif
