/* Seeded draws from finished logits. */
#ifndef HW_DRAW_H
#define HW_DRAW_H
#include "headwater.h"

#define DRAW_VOCAB (1 << 20) /* larger vocabularies are left to numpy */

/* token_ids[from .. to): what the definition draws, or -1 where it must be asked. */
void draw_rows(const hw_draws *draws, int from, int to);
#endif
