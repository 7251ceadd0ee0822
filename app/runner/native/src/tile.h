/* The one inner loop: `rows` x `columns` results of a product over k, in registers.
 *
 * out[m][n] = init[m][n] + sum over k of x[m][k] * w[k][n]; w in groups of `G` values of k a column
 * (2 bf16, 4 int8). The sum runs over k in order in one accumulator a result, whatever the tile's
 * size: so a row's bits do not depend on the rows beside it. Linears, scores and P.V all use it. */
#ifndef HW_TILE_H
#define HW_TILE_H
#include "headwater.h"
#include "vmath.h"

/* Where to draw memory in from: so many bytes further at each step. */
typedef struct {
    const char *at;
    long step;
} stream;

typedef struct {
    const void *x;    /* row-major, a 32-bit group of values at a time */
    long x_stride;    /* in 32-bit groups */
    const void *w;    /* [groups][w_stride] 32-bit groups */
    long w_stride;    /* 32-bit groups from one k to the next */
    int groups;       /* k / G */
    stream near, far, beside; /* memory that is needed next: at each step two lines, one and one */
} tile_in;

#define ROWS_LOOP _Pragma("GCC unroll 8") for (int m = 0; m < mr; m++)
#define VECS_LOOP _Pragma("GCC unroll 4") for (int j = 0; j < nv; j++)

/* Keep what was loaded in its register: GCC 12 loads it again for each row where registers are free enough. */
#define KEEP(v) __asm__("" : "+v"(v))

/* The same four instructions for every tile: a branch here costs more than a line that is there already. */
INLINE void draw_ahead(const tile_in *in, int k) {
    const char *p = in->near.at + (long)k * in->near.step;
    _mm_prefetch(p, _MM_HINT_T0);
    _mm_prefetch(p + 64, _MM_HINT_T0);
    _mm_prefetch(in->far.at + (long)k * in->far.step, _MM_HINT_T0);
    _mm_prefetch(in->beside.at + (long)k * in->beside.step, _MM_HINT_T0);
}

INLINE void tile_bf16(const int mr, const int nv, const tile_in *in, const float *init, long init_stride, float *out,
                      long out_stride) {
    const int32_t *x = in->x, *w = in->w;
    vf acc[MR_MAX][NV_MAX];
    ROWS_LOOP VECS_LOOP acc[m][j] = init ? v_load(init + m * init_stride + j * VL) : v_zero();
    for (int k = 0; k < in->groups; k++, w += in->w_stride) {
        draw_ahead(in, k);
        vi weight[NV_MAX];
        VECS_LOOP weight[j] = vi_load(w + j * VL);
        VECS_LOOP KEEP(weight[j]);
        ROWS_LOOP {
            vi b = vi_set1(x[m * in->x_stride + k]);
            VECS_LOOP acc[m][j] = v_dp(acc[m][j], weight[j], b);
        }
    }
    ROWS_LOOP VECS_LOOP v_store(out + m * out_stride + j * VL, acc[m][j]);
}

INLINE void tile_int8(const int mr, const int nv, const tile_in *in, const int32_t *init, int32_t *out,
                      long out_stride) {
    const int32_t *x = in->x, *w = in->w;
    vi acc[MR_MAX][NV_MAX];
    ROWS_LOOP VECS_LOOP acc[m][j] = init ? vi_load(init + m * out_stride + j * VL) : vi_set1(0);
    for (int k = 0; k < in->groups; k++, w += in->w_stride) {
        draw_ahead(in, k);
        vi weight[NV_MAX];
        VECS_LOOP weight[j] = vi_load(w + j * VL);
        VECS_LOOP KEEP(weight[j]);
        ROWS_LOOP {
            vi b = vi_set1(x[m * in->x_stride + k]);
            VECS_LOOP acc[m][j] = vi_dp(acc[m][j], b, weight[j]);
        }
    }
    ROWS_LOOP VECS_LOOP vi_store(out + m * out_stride + j * VL, acc[m][j]);
}

/* rows <= MR_MAX, columns a multiple of 16; init NULL = zero, else rows of init_stride floats. */
void tile_run_bf16(const tile_in *in, int rows, int columns, const float *init, long init_stride, float *out,
                   long out_stride);
/* init NULL = zero, else laid out as out. */
void tile_run_int8(const tile_in *in, int rows, int columns, const int32_t *init, int32_t *out, long out_stride);

/* Split `rows` into tiles of nearly equal height, `most` at most: the i-th of `count` starts here. */
INLINE int tile_count(int rows, int most) { return (rows + most - 1) / most; }
INLINE int tile_start(int rows, int count, int i) { return (int)((long)rows * i / count); }
#endif
