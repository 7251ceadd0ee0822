#include "context.h"

#include <stdlib.h>
#include <string.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define GAP 256 /* no man's land behind each buffer, where ASan sees an overrun */
#define FORBID(p, bytes) ASAN_POISON_MEMORY_REGION(p, bytes)
#define ALLOW(p, bytes) ASAN_UNPOISON_MEMORY_REGION(p, bytes)
#else
#define GAP 0
#define FORBID(p, bytes) ((void)(p), (void)(bytes))
#define ALLOW(p, bytes) ((void)(p), (void)(bytes))
#endif

static long padded(long n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }
static long max2(long a, long b) { return a > b ? a : b; }
long attended_stride(const hw_model *m) { return padded((long)m->num_heads * m->head_dim); }
long qkv_stride(const hw_model *m) { return m->layers[0].qkv.n_pad; }
long widest(const hw_model *m) { return max2(max2(m->hidden_pad, m->act_pad), attended_stride(m)); }

static void *carve(char **at, size_t bytes) {
    char *p = *at;
    *at += (bytes + ALIGN - 1) / ALIGN * ALIGN + GAP;
    if (GAP && (uintptr_t)p >= 4096) FORBID(p + bytes, (size_t)(*at - p) - bytes); /* below: sizes alone, from NULL */
    return p;
}

/* Lay out the buffers of a step from `base`; returns the bytes used. */
static size_t lay_out(hw_context *c, const hw_model *m, const hw_step *s, char *base) {
    char *at = base;
    if (base) ALLOW(base, c->capacity);
    const size_t tokens = (size_t)s->num_tokens, logits = (size_t)s->num_logits;
    const size_t threads = (size_t)pool_threads(c->pool), rows = tokens > logits ? tokens : logits;
    c->residual = carve(&at, tokens * (size_t)m->hidden_pad * sizeof(float)); /* first: hw_score reads it again */
    c->branch = carve(&at, m->has_post_norms ? tokens * (size_t)m->hidden_pad * sizeof(float) : 0);
    c->qkv = carve(&at, tokens * (size_t)qkv_stride(m) * sizeof(float));
    c->x = carve(&at, rows * (size_t)m->hidden_pad * 2);
    c->attended = carve(&at, tokens * (size_t)attended_stride(m) * 2);
    c->activated = carve(&at, tokens * (size_t)m->act_pad * 2);
    c->bytes = carve(&at, (size_t)m->byte_rows * rows * (size_t)widest(m));
    c->scales = carve(&at, rows * sizeof(float));
    c->block_scales = carve(&at, m->has_blocks ? rows * (size_t)(widest(m) / BLOCK_K) * sizeof(block_scale) : 0);
    c->attention.queries = carve(&at, tokens * sizeof(query));
    c->attention.items = carve(&at, tokens * (size_t)m->num_kv_heads * sizeof(attention_item));
    c->attention.held = carve(&at, MOST_HELD * sizeof(int32_t));
    c->best = carve(&at, threads * rows * sizeof(lane_best));
    c->scratch = carve(&at, threads * sizeof(attention_scratch));
    return (size_t)(at - base);
}

int context_reserve(hw_context *c, const hw_model *model, const hw_step *step) {
    const size_t bytes = lay_out(c, model, step, NULL);
    if (bytes > c->capacity) {
        free(c->memory);
        c->capacity = 0;
        const size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        c->memory = aligned_alloc(4096, size);
        if (!c->memory) return -1;
        memset(c->memory, 0, size);
        c->capacity = size;
    }
    lay_out(c, model, step, c->memory);
    return 0;
}

int context_reuse(hw_context *c, const hw_model *model, const hw_step *step) {
    if (lay_out(c, model, step, NULL) > c->capacity) return -1;
    lay_out(c, model, step, c->memory);
    return 0;
}
