/* Packed linears with what follows them done while the tile is in L1. */
#ifndef HW_LINEAR_H
#define HW_LINEAR_H
#include "tile.h"

#define UNIT 32 /* columns: the least share of a thread */

typedef enum {
    FINISH_STORE,    /* out = y */
    FINISH_ADD,      /* out += y: the residual stream */
    FINISH_SILU_MUL, /* out16 = silu(gate) * up; columns in turns of 16 gate, 16 up */
    FINISH_GELU_MUL, /* out16 = gelu(gate) * up */
    FINISH_GELU,     /* out16 = gelu(y) */
    FINISH_LOGITS,   /* out rows where wanted, and the running argmax */
} finish_kind;

/* Running argmax of one row: a lane's best value and its id, and 0 while all values were finite. */
typedef struct {
    float value[VL];
    int32_t id[VL];
    float taint[VL];
} lane_best;

typedef struct {
    finish_kind kind;
    float *out;
    uint16_t *out16;
    long stride; /* of out or out16, in elements */
    const int32_t *slots; /* FINISH_LOGITS: row of out for each row, or -1 */
    lane_best *best;      /* FINISH_LOGITS: this thread's, one a row */
    int columns;          /* FINISH_LOGITS: real columns; padding beyond is ignored */
    float cap;            /* FINISH_LOGITS: y becomes cap * tanh(y / cap); 0: it stays */
} finish;

typedef struct block_scale block_scale;

/* Inputs of a linear: bf16 rows; for int8 rows of bytes, byte_rows to each scale; for weights in blocks
 * rows of signed bytes, a block_scale to each 32. */
typedef struct {
    const uint16_t *bf16;
    const uint8_t *bytes;
    const float *scales;
    const block_scale *blocks; /* [rows][stride / 32] */
    long stride; /* elements */
} linear_in;

/* Memory that is drawn into the caches while a linear of many rows computes and memory has little to do: lines
 * from .. to - 1 of regions that lie `stride` bytes apart, in the order of `blocks`. */
typedef struct {
    const char *base;
    const int32_t *blocks;
    long stride, region_lines, from, to;
} drawing;

INLINE int linear_units(const hw_linear *linear) { return linear->n_pad / UNIT; }
/* Units of columns from .. to - 1, for all rows. beside: NULL, or what all units together draw in. */
void linear_run(const hw_linear *linear, const linear_in *in, int rows, const finish *done, const drawing *beside,
                int from, int to);
/* What is done to `width` columns of one row once they are there. */
void finish_row(const finish *done, const float *y, int row, int column, int width);
void best_reset(lane_best *best, int rows);
#endif
