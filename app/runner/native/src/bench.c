/* For loadtest/bench_kernels.py: what the machine can do at most (one thread, no memory, or nothing but memory), and
 * single kernels. */
#include "phases.h"

#define CHAINS 12 /* independent sums: enough to hide the latency of the instruction */

/* Dot-product steps on registers alone. Returns the operations done: 2 x 2 x VL a step in bf16. */
int64_t hw_peak_bf16(int64_t rounds, float *sink) {
    vf acc[CHAINS];
    vi w = vi_set1(0x3f803f80), x = vi_set1(0x3f003f00);
    for (int i = 0; i < CHAINS; i++) acc[i] = v_set1((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+v"(w), "+v"(x));
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) acc[i] = v_dp(acc[i], w, x);
    }
    for (int i = 0; i < CHAINS; i++) v_store(sink + i * VL, acc[i]);
    return rounds * CHAINS * VL * 4;
}

int64_t hw_peak_int8(int64_t rounds, int32_t *sink) {
    vi acc[CHAINS];
    vi w = vi_set1(0x01010101), x = vi_set1(0x02020202);
    for (int i = 0; i < CHAINS; i++) acc[i] = vi_set1(i);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+v"(w), "+v"(x));
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) acc[i] = vi_dp(acc[i], x, w);
    }
    for (int i = 0; i < CHAINS; i++) vi_store(sink + i * VL, acc[i]);
    return rounds * CHAINS * VL * 8;
}

/* Read `count` floats once, a multiple of 8 vectors. */
float hw_read(const float *data, int64_t count) {
    vf sum[8];
    for (int i = 0; i < 8; i++) sum[i] = v_zero();
    for (int64_t k = 0; k < count; k += 8 * VL) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sum[i] = v_add(sum[i], v_load(data + k + i * VL));
        _mm_prefetch((const char *)(data + k) + 4096, _MM_HINT_T1);
        _mm_prefetch((const char *)(data + k) + 4096 + 64, _MM_HINT_T1);
    }
    float total = 0.0f;
    for (int i = 0; i < 8; i++) total += v_sum(sum[i]);
    return total;
}

typedef struct {
    const hw_layer *layers;
    int32_t which, rows; /* which: 0 qkv, 1 output, 2 gate and up, 3 down */
    linear_in in;
    float *out;
} linear_job;

static int linears_count(const void *arg, int phase) {
    const linear_job *j = arg;
    return linear_units(&j->layers[phase].qkv + j->which);
}

static void linears_run(const void *arg, int phase, int from, int to, int thread) {
    (void)thread;
    const linear_job *j = arg;
    const hw_linear *lin = &j->layers[phase].qkv + j->which;
    finish done = {.kind = j->which == 0 ? FINISH_STORE : FINISH_ADD, .out = j->out, .stride = lin->n_pad};
    if (j->which == 2) done = (finish){.kind = FINISH_SILU_MUL, .out16 = (uint16_t *)j->out, .stride = lin->n_pad / 2};
    linear_run(lin, &j->in, j->rows, &done, NULL, from, to);
}

/* One linear of every layer, one after the other, each finished as a step finishes it. x: bf16, or bytes
 * with scales for int8, with block_scales for blocks; [rows][k]. */
void hw_run_linears(hw_context *c, const hw_layer *layers, int32_t num_layers, int32_t which, int32_t rows,
                    const void *x, const void *scales, float *out) {
    const long k = (&layers->qkv + which)->k;
    linear_job j = {layers, which, rows, {.bf16 = x, .bytes = x, .scales = scales, .blocks = scales, .stride = k}, out};
    pool_run(c->pool, &(hw_region){num_layers, linears_count, linears_run, &j});
}

static int attention_count(const void *arg, int phase) {
    const job *j = arg;
    return layer_count(j, j->model->layers + phase, ATTEND);
}

static void attention_run(const void *arg, int phase, int from, int to, int thread) {
    const job *j = arg;
    layer_run(j, j->model->layers + phase, ATTEND, from, to, thread);
}

/* The attention of every layer for a step that hw_forward computed last. */
void hw_run_attention(hw_context *c, const hw_model *model, const hw_step *step) {
    plan_attention(&c->attention, model, step, pool_threads(c->pool));
    job j = {c, model, step};
    pool_run(c->pool, &(hw_region){model->num_layers, attention_count, attention_run, &j});
}
