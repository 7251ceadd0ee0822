/* Threads that work through the phases of a region together: phase by phase, item by item. */
#ifndef HW_POOL_H
#define HW_POOL_H
#include <stdatomic.h>
#include <stdint.h>

typedef struct hw_pool hw_pool;

/* Phase p + 1 begins when all items of phase p are done. Items of one phase may be done in any order, by
 * any thread, so what an item computes must not depend on either. */
typedef struct {
    int num_phases;
    int (*count)(const void *job, int phase); /* items of a phase, 0 and up; asked once, just before it begins */
    void (*run)(const void *job, int phase, int from, int to, int thread); /* items from .. to - 1 */
    const void *job;
} hw_region;

hw_pool *pool_open(int num_threads);
void pool_close(hw_pool *pool);
/* Do a region on all threads, or on this one alone while the other cores are taken; denormals are zero on
 * each. Returns how many threads were asked. */
int pool_run(hw_pool *pool, const hw_region *region);
int pool_threads(const hw_pool *pool);
#ifdef HW_PROFILE
/* CPU time of the calling thread in each phase of all regions with `num_phases` phases; `ns` has that many. Add to it. */
void pool_profile(hw_pool *pool, int num_phases, uint64_t *ns);
#endif
#endif
