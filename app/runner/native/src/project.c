/* Linears of a step, and their inputs as bytes. */
#include "phases.h"
#include "rows.h"

void quantise_rows(const job *j, const hw_linear *lin, const uint16_t *x, long stride, int from, int to) {
    const long width = widest(j->model);
    for (int r = from; r < to; r++) {
        uint8_t *bytes = j->ctx->bytes + r * lin->byte_rows * width;
        if (lin->blocks)
            row_quantise_blocks(x + r * stride, lin->k, (int8_t *)bytes, j->ctx->block_scales + r * (width / BLOCK_K));
        else if (lin->byte_rows == 1) row_quantise(x + r * stride, lin->k, bytes, j->ctx->scales + r);
        else row_quantise_wide(x + r * stride, lin->k, bytes, bytes + width, j->ctx->scales + r);
    }
}

void project(const job *j, const hw_linear *lin, const uint16_t *x, long stride, int rows, const finish *done,
                    const drawing *beside, int from, int to) {
    linear_in in = {.bf16 = x, .stride = stride};
    if (lin->byte_rows)
        in = (linear_in){.bytes = j->ctx->bytes, .scales = j->ctx->scales, .blocks = j->ctx->block_scales,
                         .stride = widest(j->model)};
    linear_run(lin, &in, rows, done, beside, from, to);
}
