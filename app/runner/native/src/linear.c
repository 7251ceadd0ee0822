/* Columns are shared out, never k: a column's sum is one thread's, in one order. */
#include "linear.h"

#include <math.h>

#include "blocks.h"

static void finish_store(const finish *f, const float *y, int row, int column, int width) {
    float *out = f->out + row * f->stride + column;
    for (int c = 0; c < width; c += VL) v_store(out + c, v_load(y + c));
}

static void finish_add(const finish *f, const float *y, int row, int column, int width) {
    float *out = f->out + row * f->stride + column;
    for (int c = 0; c < width; c += VL) v_store(out + c, v_add(v_load(out + c), v_load(y + c)));
}

static void finish_gelu(const finish *f, const float *y, int row, int column, int width) {
    uint16_t *out = f->out16 + row * f->stride + column;
    for (int c = 0; c < width; c += VL) v_store_bf16(out + c, v_gelu(v_load(y + c)));
}

INLINE void finish_gated(const int is_gelu, const finish *f, const float *y, int row, int column, int width) {
    uint16_t *out = f->out16 + row * f->stride + column / 2;
    for (int unit = 0; unit < width; unit += UNIT)
        for (int c = 0; c < UNIT / 2; c += VL) {
            vf gate = v_load(y + unit + c), up = v_load(y + unit + UNIT / 2 + c);
            v_store_bf16(out + unit / 2 + c, v_mul(is_gelu ? v_gelu(gate) : v_silu(gate), up));
        }
}

static void finish_logits(const finish *f, const float *y, int row, int column, int width) {
    float capped[COLUMNS];
    if (f->cap > 0.0f) {
        for (int c = 0; c < width; c += VL) v_store(capped + c, v_cap(v_load(y + c), f->cap));
        y = capped;
    }
    if (f->slots[row] >= 0) {
        float *out = f->out + (long)f->slots[row] * f->stride + column;
        for (int c = 0; c < width; c += VL) v_store(out + c, v_load(y + c));
    }
    lane_best *best = f->best + row;
    vf value = v_load(best->value), taint = v_load(best->taint);
    vi id = vi_load(best->id);
    for (int c = 0; c < width; c += VL) {
        vm real = v_first(f->columns - column - c);
        vf logit = v_load(y + c);
        taint = v_fma(v_select(real, logit, v_zero()), v_zero(), taint); /* not finite times 0 is NaN */
        vm better = v_greater(v_select(real, logit, v_set1(-INFINITY)), value);
        value = v_select(better, logit, value);
        /* ids are column + c + lane, kept without the lane until the end */
        id = vi_select(better, vi_set1(column + c), id);
    }
    v_store(best->value, value);
    v_store(best->taint, taint);
    vi_store(best->id, id);
}

void best_reset(lane_best *best, int rows) {
    for (int r = 0; r < rows; r++) {
        v_store(best[r].value, v_set1(-INFINITY));
        v_store(best[r].taint, v_zero());
        vi_store(best[r].id, vi_set1(0));
    }
}

void finish_row(const finish *f, const float *y, int row, int column, int width) {
    switch (f->kind) {
        case FINISH_STORE: finish_store(f, y, row, column, width); break;
        case FINISH_ADD: finish_add(f, y, row, column, width); break;
        case FINISH_SILU_MUL: finish_gated(0, f, y, row, column, width); break;
        case FINISH_GELU_MUL: finish_gated(1, f, y, row, column, width); break;
        case FINISH_GELU: finish_gelu(f, y, row, column, width); break;
        case FINISH_LOGITS: finish_logits(f, y, row, column, width); break;
    }
}

/* int8 sums to floats: undo the +128 of the inputs, then both scales, then the bias. */
static void rescale(const hw_linear *lin, const int32_t *sums, float scale, int column, int width, float *y) {
    vf x_scale = v_set1(scale);
    for (int c = 0; c < width; c += VL) {
        vf sum = vi_to_float(vi_sub(vi_load(sums + c), vi_load(lin->zero + column + c)));
        vf value = v_mul(v_mul(sum, v_load(lin->scale + column + c)), x_scale);
        v_store(y + c, lin->bias ? v_add(value, v_load(lin->bias + column + c)) : value);
    }
}

/* The same for 16-bit inputs, whose high and low bytes were summed apart. */
static void rescale_wide(const hw_linear *lin, const int32_t *high, const int32_t *low, float scale, int column,
                         int width, float *y) {
    vf x_scale = v_set1(scale);
    for (int c = 0; c < width; c += VL) {
        vf upper = vi_to_float(vi_sub(vi_load(high + c), vi_load(lin->zero + column + c)));
        vf sum = v_fma(upper, v_set1(256.0f), vi_to_float(vi_load(low + c)));
        vf value = v_mul(v_mul(sum, v_load(lin->scale + column + c)), x_scale);
        v_store(y + c, lin->bias ? v_add(value, v_load(lin->bias + column + c)) : value);
    }
}

/* One tile of rows against one column block (or half of one). */
static void tile_rows(const hw_linear *lin, const linear_in *in, tile_in *t, int row, int rows, int column, int width,
                      const finish *done) {
    float y[MR_MAX][COLUMNS];
    if (lin->byte_rows) {
        int32_t sums[MR_MAX][COLUMNS];
        t->x = in->bytes + row * lin->byte_rows * in->stride;
        tile_run_int8(t, rows * lin->byte_rows, width, sums[0], COLUMNS);
        for (int m = 0; m < rows; m++) {
            float scale = in->scales[row + m];
            if (lin->byte_rows == 1) rescale(lin, sums[m], scale, column, width, y[m]);
            else rescale_wide(lin, sums[2 * m], sums[2 * m + 1], scale, column, width, y[m]);
        }
    } else {
        t->x = in->bf16 + row * in->stride;
        tile_run_bf16(t, rows, width, lin->bias ? lin->bias + column : NULL, 0, y[0], COLUMNS);
    }
    for (int m = 0; m < rows; m++) finish_row(done, y[m], row + m, column, width);
}

void linear_run(const hw_linear *lin, const linear_in *in, int rows, const finish *done, int from, int to) {
    if (lin->blocks) {
        blocks_run(lin, in, rows, done, from, to);
        return;
    }
    const int per_group = lin->byte_rows ? 4 : 2;
    const long groups = lin->k / per_group, block_bytes = groups * COLUMNS * 4;
    const int count = tile_count(rows, lin->byte_rows == 2 ? MR_MAX / 2 : MR_MAX);
    for (int unit = from, step; unit < to; unit += step) {
        step = (unit % 2 == 0 && unit + 1 < to) ? 2 : 1;
        const char *block = (const char *)lin->weight + unit / 2 * block_bytes;
        tile_in t = {.w = block + unit % 2 * UNIT * 4, .w_stride = COLUMNS, .groups = (int)groups};
        t.x_stride = in->stride / per_group;
        t.ahead_step = COLUMNS * 4 / count;
        for (int i = 0; i < count; i++) {
            int row = tile_start(rows, count, i), next = tile_start(rows, count, i + 1);
            /* One tile: run ahead in this block. Several: each draws its share of the next block. */
            t.ahead = count == 1 ? block + 16 * COLUMNS * 4 : block + block_bytes + i * t.ahead_step * groups;
            tile_rows(lin, in, &t, row, next - row, unit * UNIT, step * UNIT, done);
        }
    }
}
