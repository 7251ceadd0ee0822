/* Weights in blocks of 32: unpacked in registers, never kept as anything larger. */
#include "blocks.h"

#include <string.h>

#define AHEAD 4096 /* bytes; memory is read in one stream */

static long blocks_of(long k) { return (k + BLOCK_K - 1) / BLOCK_K; }

typedef struct {
    const int8_t *x;
    long x_stride;
    const block_scale *scales;
    long scale_stride;
    const char *w; /* the unit */
    long blocks;
    int column; /* of the unit, where the tile begins */
    int is_first; /* reads the unit from memory: ask for what comes next */
    const float *init; /* [UNIT] or NULL */
} blocks_in;

#define TILE_ROWS _Pragma("GCC unroll 8") for (int m = 0; m < mr; m++)
#define TILE_VECS _Pragma("GCC unroll 4") for (int j = 0; j < nv; j++)

INLINE vi broadcast(const int8_t *x, int group) {
    int32_t four;
    memcpy(&four, x + 4 * group, 4);
    return vi_set1(four);
}

/* Exact sums over one block: integers. */
INLINE void dot_block(const int kind, const int mr, const int nv, const char *w, const int8_t *x, long x_stride,
                      vi sums[MR_MAX][BLOCKS_NV]) {
    TILE_ROWS TILE_VECS sums[m][j] = vi_set1(0);
    for (int word = 0; word < blocks_words(kind); word++) {
        vi low[BLOCKS_NV], high[BLOCKS_NV];
        TILE_VECS {
            vi packed = vi_load(w + (word * UNIT + j * VL) * 4);
            low[j] = blocks_is_4(kind) ? vi_low_nibbles(packed) : packed;
            high[j] = blocks_is_4(kind) ? vi_high_nibbles(packed) : packed;
        }
        TILE_ROWS {
            vi at_low = broadcast(x + m * x_stride, word);
            TILE_VECS sums[m][j] = blocks_is_4(kind) ? nibbles_dp(sums[m][j], low[j], at_low) : vi_dp(sums[m][j], low[j], at_low);
            if (!blocks_is_4(kind)) continue;
            vi at_high = broadcast(x + m * x_stride, word + 4);
            TILE_VECS sums[m][j] = nibbles_dp(sums[m][j], high[j], at_high);
        }
    }
    if (blocks_is_4(kind)) TILE_ROWS TILE_VECS sums[m][j] = nibbles_sum(sums[m][j]);
}

INLINE void add_block(const int kind, const int mr, const int nv, const char *w, int column, const block_scale *scales,
                      long scale_stride, vi sums[MR_MAX][BLOCKS_NV], vf acc[MR_MAX][BLOCKS_NV]) {
    const uint16_t *scale_at = (const uint16_t *)(w + blocks_scales_at(kind)) + column;
    vf scale[BLOCKS_NV], minimum[BLOCKS_NV];
    TILE_VECS {
        scale[j] = v_load_f16(scale_at + j * VL);
        minimum[j] = blocks_has_min(kind) ? v_load_f16(scale_at + UNIT + j * VL) : v_zero();
    }
    TILE_ROWS {
        const block_scale *s = scales + m * scale_stride;
        vi start = vi_set1(blocks_offset(kind) * s->sum);
        vf x_scale = v_set1(s->scale), x_sum = v_set1(s->scaled_sum);
        TILE_VECS {
            vi sum = blocks_has_min(kind) ? sums[m][j] : vi_sub(sums[m][j], start);
            acc[m][j] = v_fma(vi_to_float(sum), v_mul(scale[j], x_scale), acc[m][j]);
            if (blocks_has_min(kind)) acc[m][j] = v_fma(minimum[j], x_sum, acc[m][j]);
        }
    }
}

INLINE void blocks_tile(const int kind, const int mr, const int nv, const blocks_in *in, float *out) {
    const blocks_in at = *in;
    const char *w = at.w;
    vf acc[MR_MAX][BLOCKS_NV];
    TILE_ROWS TILE_VECS acc[m][j] = at.init ? v_load(at.init + at.column + j * VL) : v_zero();
    for (long b = 0; b < at.blocks; b++, w += blocks_bytes(kind)) {
        if (at.is_first)
            for (int line = 0; line < blocks_bytes(kind); line += 64) _mm_prefetch(w + AHEAD + line, _MM_HINT_T0);
        vi sums[MR_MAX][BLOCKS_NV];
        dot_block(kind, mr, nv, w + at.column * 4, at.x + b * BLOCK_K, at.x_stride, sums);
        add_block(kind, mr, nv, w, at.column, at.scales + b, at.scale_stride, sums, acc);
    }
    TILE_ROWS TILE_VECS v_store(out + m * UNIT + at.column + j * VL, acc[m][j]);
}

/* One function for each kind and height; the widest tile whose two sums a result fit the registers. */
#define DEFINE(kind, mr)                                                                        \
    static __attribute__((noinline)) void tile_##kind##_##mr(const blocks_in *in, float *out) { \
        blocks_in part = *in;                                                                   \
        for (part.column = 0; part.column < UNIT; part.column += BLOCKS_NV_OF(mr) * VL) {       \
            blocks_tile(kind, mr, BLOCKS_NV_OF(mr), &part, out);                                \
            part.is_first = 0;                                                                  \
        }                                                                                       \
    }
#define ENTRY(kind, mr) [kind][mr] = tile_##kind##_##mr,
#if MR_MAX == 6
#define FOR_ROWS(DO, kind) DO(kind, 1) DO(kind, 2) DO(kind, 3) DO(kind, 4) DO(kind, 5) DO(kind, 6)
#else
#define FOR_ROWS(DO, kind) DO(kind, 1) DO(kind, 2) DO(kind, 3) DO(kind, 4)
#endif
#define FOR_KINDS(DO) FOR_ROWS(DO, BLOCKS_4) FOR_ROWS(DO, BLOCKS_4_MIN) FOR_ROWS(DO, BLOCKS_8) FOR_ROWS(DO, BLOCKS_8_MIN)
FOR_KINDS(DEFINE)

typedef void (*tile_fn)(const blocks_in *, float *);
static const tile_fn tiles[BLOCKS_KINDS][MR_MAX + 1] = {FOR_KINDS(ENTRY)};

static long unit_bytes(const hw_linear *lin) { return blocks_bytes(lin->blocks) * blocks_of(lin->k); }

void blocks_run(const hw_linear *lin, const linear_in *in, int rows, const finish *done, int from, int to) {
    const int count = tile_count(rows, MR_MAX);
    const long scale_stride = in->stride / BLOCK_K;
    for (int unit = from; unit < to; unit++)
        for (int i = 0; i < count; i++) {
            const int row = tile_start(rows, count, i), next = tile_start(rows, count, i + 1);
            float y[MR_MAX][UNIT];
            const blocks_in tile = {
                .x = (const int8_t *)in->bytes + row * in->stride,
                .x_stride = in->stride,
                .scales = in->blocks + row * scale_stride,
                .scale_stride = scale_stride,
                .w = (const char *)lin->weight + unit * unit_bytes(lin),
                .blocks = blocks_of(lin->k),
                .is_first = i == 0,
                .init = lin->bias ? lin->bias + unit * UNIT : NULL,
            };
            tiles[lin->blocks][next - row](&tile, y[0]);
            for (int m = 0; m < next - row; m++) finish_row(done, y[m], row + m, unit * UNIT, UNIT);
        }
}

void blocks_column(const hw_linear *lin, int column, float *out) {
    const int kind = lin->blocks, at = column % UNIT;
    const char *w = (const char *)lin->weight + column / UNIT * unit_bytes(lin);
    for (long b = 0; b < blocks_of(lin->k); b++, w += blocks_bytes(kind)) {
        const uint16_t *scales = (const uint16_t *)(w + blocks_scales_at(kind)) + at;
        const float scale = f16_to_float(scales[0]), minimum = blocks_has_min(kind) ? f16_to_float(scales[UNIT]) : 0.0f;
        for (int i = 0; i < BLOCK_K && b * BLOCK_K + i < lin->k; i++) {
            const int word = blocks_is_4(kind) ? i % 16 / 4 : i / 4;
            const uint8_t byte = ((const uint8_t *)w)[(word * UNIT + at) * 4 + i % 4];
            const int value = blocks_is_4(kind) ? (i < 16 ? byte & 15 : byte >> 4) : byte;
            out[b * BLOCK_K + i] = scale * (float)(value - blocks_offset(kind)) + minimum;
        }
    }
}

static void quantise_block(const uint16_t *x, int8_t *bytes, block_scale *s) {
    vf largest = v_zero();
    for (int i = 0; i < BLOCK_K; i += VL) largest = v_max(largest, v_abs(v_load_bf16(x + i)));
    const float most = v_largest(largest);
    const vf inverse = v_set1(most > 0.0f ? 127.0f / most : 0.0f);
    for (int i = 0; i < BLOCK_K; i += VL) v_store_s8(bytes + i, v_mul(v_load_bf16(x + i), inverse));
    int32_t sum = 0;
    for (int i = 0; i < BLOCK_K; i++) sum += bytes[i];
    const float scale = most / 127.0f;
    *s = (block_scale){scale, scale * (float)sum, sum, 0};
}

void row_quantise_blocks(const uint16_t *x, int k, int8_t *bytes, block_scale *scales) {
    int i = 0;
    for (; i + BLOCK_K <= k; i += BLOCK_K) quantise_block(x + i, bytes + i, scales + i / BLOCK_K);
    if (i == k) return;
    uint16_t last[BLOCK_K] = {0};
    memcpy(last, x + i, (size_t)(k - i) * sizeof *x);
    quantise_block(last, bytes + i, scales + i / BLOCK_K);
}
