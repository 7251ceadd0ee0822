/* Threads, and the scratch memory that a step is carved into. */
#ifndef HW_CONTEXT_H
#define HW_CONTEXT_H
#include "attention.h"
#include "blocks.h"
#include "pool.h"

#define ALIGN 64

struct hw_context {
    hw_pool *pool;
    char *memory;
    char *draw_memory; /* [thread] */
    size_t capacity, draw_capacity;
    /* carved out of memory for the running step */
    float *residual, *branch, *qkv, *scales; /* branch: what is normed before it joins the residual */
    uint16_t *x, *attended, *activated;
    uint8_t *bytes;
    block_scale *block_scales;
    attention_plan attention;
    lane_best *best;            /* [thread][logits row] */
    attention_scratch *scratch; /* [thread] */
};

/* What the threads work on. */
typedef struct {
    hw_context *ctx;
    const hw_model *model;
    const hw_step *step;
} job;

/* Carve a step's buffers out of memory that is there, or that is taken now. -1: memory is short. */
int context_reserve(hw_context *c, const hw_model *model, const hw_step *step);
/* The same out of memory that is there already, or -1; the residual stays as it is. */
int context_reuse(hw_context *c, const hw_model *model, const hw_step *step);

long attended_stride(const hw_model *model);
long qkv_stride(const hw_model *model);
/* Of a row of bytes. */
long widest(const hw_model *model);
#endif
