/* Linears whose weights have a scale for each 32 values of k, as GGUF files have them.
 *
 * Packed: [n_pad / 32][blocks of k][bytes of one block of one unit], where a block has
 *   4 bits: [4 words][32 columns] 32-bit words; a byte of word w holds the values 4w + i (low) and 16 + 4w + i (high)
 *   8 bits: [8 words][32 columns], the values 4w + i
 *   then scales [32] and, in kinds with minima, minima [32], both float16.
 * Weights are unsigned: w = scale * (value - offset) or scale * value + minimum. Inputs are signed bytes with
 * a scale for each 32. Sums within a block are exact integers; blocks are added in order of k in one float:
 * a result's bits depend on its own row and column alone. */
#ifndef HW_BLOCKS_H
#define HW_BLOCKS_H
#include "linear.h"

#define BLOCK_K 32

/* hw_linear.blocks. 0: not in blocks. */
enum { BLOCKS_4 = 1, BLOCKS_4_MIN, BLOCKS_8, BLOCKS_8_MIN, BLOCKS_KINDS };

INLINE int blocks_is_4(int kind) { return kind <= BLOCKS_4_MIN; }
INLINE int blocks_has_min(int kind) { return kind % 2 == 0; }
INLINE int blocks_offset(int kind) { return kind == BLOCKS_4 ? 8 : kind == BLOCKS_8 ? 128 : 0; }
INLINE int blocks_words(int kind) { return blocks_is_4(kind) ? 4 : 8; }
/* Of one block of one unit: where its scales begin, and its size; a multiple of 64. */
INLINE int blocks_scales_at(int kind) { return blocks_words(kind) * UNIT * 4; }
INLINE int blocks_bytes(int kind) { return blocks_scales_at(kind) + UNIT * 2 * (1 + blocks_has_min(kind)); }

/* What 32 inputs have in common. */
struct block_scale {
    float scale, scaled_sum; /* scaled_sum = scale * sum */
    int32_t sum, reserved;
};

/* bytes = round(x / scale), scale = max|x| / 127 of each 32; bytes and scales for k rounded up to 32. */
void row_quantise_blocks(const uint16_t *x, int k, int8_t *bytes, block_scale *scales);
/* Units from .. to - 1, for all rows. */
void blocks_run(const hw_linear *linear, const linear_in *in, int rows, const finish *done, int from, int to);
/* out[0 .. k) = column `column` of the weights. */
void blocks_column(const hw_linear *linear, int column, float *out);
#endif
