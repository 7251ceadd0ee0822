/* Columns are shared out, never k: a column's sum is one thread's, in one order. */
#include "linear.h"

#include <math.h>

#include "blocks.h"

#define STRIP 64      /* groups of k that are read by all tiles while they are in L1 */
#define STRIP_ROWS 16 /* with more rows arithmetic takes so long that reading weights again from L2 costs nothing */
#define LINE 64       /* bytes that memory brings at once */
#define GROUP_BYTES (COLUMNS * 4L)
#define NEAR_STEPS 16 /* how far one tile alone runs ahead of itself */

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

/* The columns of one unit or two. */
typedef struct {
    const hw_linear *lin;
    const linear_in *in;
    const finish *done;
    const drawing *beside;
    const char *weights; /* of the first column */
    int column, width;
} piece;

/* Sums of some rows: bf16, or int8 with byte_rows rows to a row of inputs. */
typedef union {
    float bf16[STRIP_ROWS][COLUMNS];
    int32_t int8[STRIP_ROWS * 2][COLUMNS];
} sums;

static int groups_of(const hw_linear *lin) { return lin->k / (lin->byte_rows ? 4 : 2); }

/* Rows of inputs that one tile holds. */
static int tile_height(const hw_linear *lin) { return lin->byte_rows == 2 ? MR_MAX / 2 : MR_MAX; }

/* Add t->groups groups of k, from `from` on, to the sums of `rows` rows from `row` on, which are those from `at` on. */
static void add_tile(const piece *p, tile_in *t, int row, int rows, int from, sums *s, int at) {
    const int byte_rows = p->lin->byte_rows;
    t->w = p->weights + from * GROUP_BYTES;
    if (byte_rows) {
        int32_t *out = s->int8[at * byte_rows];
        t->x = p->in->bytes + row * byte_rows * p->in->stride + from * 4;
        tile_run_int8(t, rows * byte_rows, p->width, from ? out : NULL, out, COLUMNS);
    } else {
        const float *bias = p->lin->bias ? p->lin->bias + p->column : NULL;
        float *out = s->bf16[at];
        t->x = p->in->bf16 + row * p->in->stride + from * 2;
        tile_run_bf16(t, rows, p->width, from ? out : bias, from ? COLUMNS : 0, out, COLUMNS);
    }
}

static void finish_rows(const piece *p, int row, int rows, const sums *s) {
    _Alignas(64) float y[STRIP_ROWS][COLUMNS];
    const float *scales = p->in->scales + row;
    if (p->lin->byte_rows == 1)
        for (int m = 0; m < rows; m++) rescale(p->lin, s->int8[m], scales[m], p->column, p->width, y[m]);
    if (p->lin->byte_rows == 2)
        for (int m = 0; m < rows; m++)
            rescale_wide(p->lin, s->int8[2 * m], s->int8[2 * m + 1], scales[m], p->column, p->width, y[m]);
    const float *values = p->lin->byte_rows ? y[0] : s->bf16[0];
    for (int m = 0; m < rows; m++) finish_row(p->done, values + m * COLUMNS, row + m, p->column, p->width);
}

static tile_in tile_of(const piece *p) {
    return (tile_in){.w_stride = COLUMNS, .x_stride = p->in->stride / (p->lin->byte_rows ? 4 : 2)};
}

/* Few rows: a strip of k at a time goes through all tiles, each of which draws a part of the next strip. Sums rest in
 * memory between strips, which changes no bit of them. One tile alone draws the next lines of what it reads. */
static void run_strips(const piece *p, int rows) {
    _Alignas(64) sums s;
    const int groups = groups_of(p->lin), count = tile_count(rows, tile_height(p->lin));
    const int strip = count == 1 ? groups : STRIP;
    const long step = GROUP_BYTES / count;
    tile_in t = tile_of(p);
    for (int from = 0; from < groups; from += strip) {
        t.groups = groups - from < strip ? groups - from : strip;
        const char *after = p->weights + (long)(from + (count == 1 ? NEAR_STEPS : strip)) * GROUP_BYTES;
        for (int i = 0; i < count; i++) {
            const int row = tile_start(rows, count, i), next = tile_start(rows, count, i + 1);
            t.near = (stream){after + i * step * t.groups, step};
            t.far = (stream){t.near.at + GROUP_BYTES / 2, step}; /* the same lines again, unless one tile has all four */
            t.beside = (stream){t.near.at + GROUP_BYTES * 3 / 4, step};
            add_tile(p, &t, row, next - row, from, &s, row);
        }
    }
    finish_rows(p, 0, rows, &s);
}

/* What the `index`-th of the `count` tiles of a block of columns draws of what lies beside. */
static stream part_beside(const piece *p, int index, int count) {
    const drawing *d = p->beside;
    const long tiles = (long)p->lin->n_pad / COLUMNS * count, lines = (d->to - d->from + tiles - 1) / tiles;
    const long line = d->from + (p->column / COLUMNS * (long)count + index) * lines, groups = groups_of(p->lin);
    if (line >= d->to) return (stream){p->weights, 0};
    const char *region = d->base + d->blocks[line / d->region_lines] * d->stride;
    return (stream){region + line % d->region_lines * LINE, lines < groups ? lines * LINE / groups : LINE};
}

/* Many rows: a tile goes through all of k, and draws a part of the next columns. */
static void run_tiles(const piece *p, int rows) {
    _Alignas(64) sums s;
    const int groups = groups_of(p->lin), count = tile_count(rows, tile_height(p->lin));
    const long step = GROUP_BYTES / count;
    tile_in t = tile_of(p);
    t.groups = groups;
    t.near = t.beside = (stream){p->weights, 0};
    for (int i = 0; i < count; i++) {
        const int row = tile_start(rows, count, i), next = tile_start(rows, count, i + 1);
        t.far = (stream){p->weights + (GROUP_BYTES + i * step) * groups, step};
        if (p->beside && p->column % COLUMNS == 0) t.beside = part_beside(p, i, count);
        add_tile(p, &t, row, next - row, 0, &s, 0);
        finish_rows(p, row, next - row, &s);
    }
}

void linear_run(const hw_linear *lin, const linear_in *in, int rows, const finish *done, const drawing *beside,
                int from, int to) {
    if (lin->blocks) {
        blocks_run(lin, in, rows, done, from, to);
        return;
    }
    const long block_bytes = groups_of(lin) * GROUP_BYTES;
    for (int unit = from, step; unit < to; unit += step) {
        step = (unit % 2 == 0 && unit + 1 < to) ? 2 : 1;
        const char *weights = (const char *)lin->weight + unit / 2 * block_bytes + unit % 2 * UNIT * 4;
        const piece p = {lin, in, done, beside, weights, unit * UNIT, step * UNIT};
        if (rows <= STRIP_ROWS) run_strips(&p, rows);
        else run_tiles(&p, rows);
    }
}
