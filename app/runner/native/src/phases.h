/* What a step does, phase by phase; a phase's items may be done in any order, by any thread. */
#ifndef HW_PHASES_H
#define HW_PHASES_H
#include "context.h"

/* Of a layer, in order. */
enum {
    ATTENTION_NORM, QKV, ROTATE, ATTEND, QUANTISE_ATTENDED, OUTPUT, JOIN_ATTENDED, MLP_NORM, GATE_UP,
    QUANTISE_ACTIVATED, DOWN, JOIN_MLP, LAYER_PHASES
};
int layer_count(const job *j, const hw_layer *layer, int phase);
void layer_run(const job *j, const hw_layer *layer, int phase, int from, int to, int thread);

/* Of the head. */
enum { HEAD_NORM, HEAD, SETTLE, HEAD_PHASES };
int head_count(const job *j, int phase);
void head_run(const job *j, int phase, int from, int to, int thread);

/* Inputs of a linear as bytes, rows from .. to - 1. */
void quantise_rows(const job *j, const hw_linear *lin, const uint16_t *x, long stride, int from, int to);
/* x times units from .. to - 1 of a linear into `done`; where its inputs are bytes, they are there. */
void project(const job *j, const hw_linear *lin, const uint16_t *x, long stride, int rows, const finish *done,
             const drawing *beside, int from, int to);
#endif
