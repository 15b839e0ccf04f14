/* The benchmark's programs: what they share. */
#ifndef MIMUS_BENCH_H
#define MIMUS_BENCH_H

#include <stddef.h>
#include <stdint.h>

/* One row: its name, and work that gives a value which depends on all that was computed. */
struct row {
    const char *name;
    uint64_t (*run)(void);
    /* Null, or whether this processor can run it. */
    int (*able)(void);
};

/* Lists that end with a row without name. */
extern const struct row integer_rows[], structure_rows[], memory_rows[], kernel_rows[];
extern const struct row float_rows[], parallel_rows[];
#ifdef WITH_X86
extern const struct row x87_rows[], simd_rows[];
#endif

/* The program's own path, which fork+exec runs. */
extern const char *self_path;

/* A job of parallel-make, which is a process of its own; its exit status. */
int parallel_job(int job);

/* xorshift64*: the same numbers everywhere. */
static inline uint64_t next_random(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 0x2545f4914f6cdd1dull;
}

/* FNV-1a over bytes, to reduce a buffer to a value. */
static inline uint64_t fold(const void *data, size_t len)
{
    const unsigned char *p = data;
    uint64_t h = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < len; i++)
        h = (h ^ p[i]) * 0x100000001b3ull;
    return h;
}

/* Memory or the end of the program. */
void *need(size_t bytes);

#endif
