/* The register tiles of tile.h, one function for each height and width. */
#include "tile.h"

#define NOINLINE static __attribute__((noinline))
#define DEFINE(mr, nv)                                                                                        \
    NOINLINE void bf16_##mr##x##nv(const tile_in *in, const float *init, long init_stride, float *out,        \
                                   long out_stride) {                                                         \
        const tile_in local = *in;                                                                            \
        tile_bf16(mr, nv, &local, init, init_stride, out, out_stride);                                        \
    }                                                                                                         \
    NOINLINE void int8_##mr##x##nv(const tile_in *in, const int32_t *init, int32_t *out, long out_stride) {   \
        const tile_in local = *in;                                                                            \
        tile_int8(mr, nv, &local, init, out, out_stride);                                                     \
    }
#define FOR_ROWS(DO, nv) DO(1, nv) DO(2, nv) DO(3, nv) DO(4, nv) MORE_ROWS(DO, nv)
#if MR_MAX == 6
#define MORE_ROWS(DO, nv) DO(5, nv) DO(6, nv)
#else
#define MORE_ROWS(DO, nv)
#endif
FOR_ROWS(DEFINE, 1)
FOR_ROWS(DEFINE, 2)
#if NV_MAX == 4
FOR_ROWS(DEFINE, 4)
#endif

typedef void (*bf16_fn)(const tile_in *, const float *, long, float *, long);
typedef void (*int8_fn)(const tile_in *, const int32_t *, int32_t *, long);

#define BF16_ENTRY(mr, nv) [mr] = bf16_##mr##x##nv,
#define INT8_ENTRY(mr, nv) [mr] = int8_##mr##x##nv,
static const bf16_fn bf16_tiles[NV_MAX + 1][MR_MAX + 1] = {
    [1] = {FOR_ROWS(BF16_ENTRY, 1)},
    [2] = {FOR_ROWS(BF16_ENTRY, 2)},
#if NV_MAX == 4
    [4] = {FOR_ROWS(BF16_ENTRY, 4)},
#endif
};
static const int8_fn int8_tiles[NV_MAX + 1][MR_MAX + 1] = {
    [1] = {FOR_ROWS(INT8_ENTRY, 1)},
    [2] = {FOR_ROWS(INT8_ENTRY, 2)},
#if NV_MAX == 4
    [4] = {FOR_ROWS(INT8_ENTRY, 4)},
#endif
};

/* Widest tile that fits: 4, 2 or 1 vectors. */
static int vectors_for(int columns) {
    int vectors = NV_MAX;
    while (vectors * VL > columns) vectors /= 2;
    return vectors;
}

void tile_run_bf16(const tile_in *in, int rows, int columns, const float *init, long init_stride, float *out,
                   long out_stride) {
    tile_in part = *in;
    for (int c = 0, vectors; c < columns; c += vectors * VL) {
        vectors = vectors_for(columns - c);
        part.w = (const int32_t *)in->w + c;
        bf16_tiles[vectors][rows](&part, init ? init + c : init, init_stride, out + c, out_stride);
    }
}

void tile_run_int8(const tile_in *in, int rows, int columns, const int32_t *init, int32_t *out, long out_stride) {
    tile_in part = *in;
    for (int c = 0, vectors; c < columns; c += vectors * VL) {
        vectors = vectors_for(columns - c);
        part.w = (const int32_t *)in->w + c;
        int8_tiles[vectors][rows](&part, init ? init + c : init, out + c, out_stride);
    }
}
