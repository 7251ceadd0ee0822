/* Threads that meet at barriers inside one parallel region a step. */
#ifndef HW_POOL_H
#define HW_POOL_H
#include <stdatomic.h>
#include <stdint.h>

typedef struct hw_pool hw_pool;
typedef void (*region_fn)(void *arg, int thread, int num_threads);

hw_pool *pool_open(int num_threads);
void pool_close(hw_pool *pool);
/* Run fn on all threads (or on this one alone while the other cores are taken); fn's last act must be
 * pool_barrier. Returns how many threads ran. */
int pool_run(hw_pool *pool, region_fn fn, void *arg);
void pool_barrier(hw_pool *pool, int num_threads);
int pool_threads(const hw_pool *pool);
#endif
