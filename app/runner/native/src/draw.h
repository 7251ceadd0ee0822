/* Draws from finished logits, equal to app.runner.sampling's bit for bit. */
#ifndef HW_DRAW_H
#define HW_DRAW_H
#include <stddef.h>

#include "headwater.h"

#define DRAW_VOCAB (1 << 20) /* as many weights add up exactly */

/* Bytes that one thread needs, a multiple of 64. */
size_t draw_scratch(int32_t vocab);
void draw_row(hw_row *row, int32_t vocab, char *scratch);
#endif
