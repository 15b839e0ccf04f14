/* Copying and filling: the C library's way, and the processor's string instructions. */
#include <stdlib.h>
#include <string.h>

#include "bench.h"

enum { BYTES = 1 << 20 };

static uint64_t copies(void)
{
    char *a = need(BYTES), *b = need(BYTES);
    memset(a, 7, BYTES);
    for (int round = 0; round < 600; round++) {
        a[round] = (char)round;
        memcpy(b, a, BYTES);
        memmove(a + 64, b, BYTES - 64);
    }
    uint64_t value = fold(b, BYTES);
    free(a), free(b);
    return value;
}

/* Short ones, as programs make them most. */
static uint64_t small_copies(void)
{
    char *a = need(4096), *b = need(4096);
    uint64_t seed = 10, sum = 0;
    for (int round = 0; round < 1500000; round++) {
        uint64_t r = next_random(&seed);
        volatile size_t len = r >> 58;
        memcpy(b + (r & 1023), a + (r >> 10 & 1023), len);
        a[r >> 20 & 2047] = (char)r;
        sum += (unsigned char)b[r & 1023];
    }
    free(a), free(b);
    return sum;
}

static uint64_t string_functions(void)
{
    char *text = need(1 << 16);
    uint64_t sum = 0;
    memset(text, 'a', (1 << 16) - 1);
    memcpy(text + 60000, "needle", 6);
    for (int round = 0; round < 2500; round++) {
        text[round * 7 % 50000] = 'b';
        sum += strlen(text) + (size_t)(strchr(text, 'n') - text) + (memchr(text, 'z', 60000) != 0);
    }
    free(text);
    return sum;
}

#ifdef WITH_X86
static uint64_t rep_movsb(void)
{
    char *a = need(BYTES), *b = need(BYTES);
    memset(a, 9, BYTES);
    for (int round = 0; round < 500; round++) {
        void *from = a, *to = b;
        size_t n = BYTES - (size_t)round;
        a[round * 5] = (char)round;
        __asm__ volatile("rep movsb" : "+S"(from), "+D"(to), "+c"(n) : : "memory");
    }
    uint64_t value = fold(b, BYTES);
    free(a), free(b);
    return value;
}

static uint64_t rep_stosb(void)
{
    char *a = need(BYTES);
    for (int round = 0; round < 1000; round++) {
        void *to = a;
        size_t n = BYTES - (size_t)round;
        __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(round) : "memory");
    }
    uint64_t value = fold(a, BYTES);
    free(a);
    return value;
}

/* Short ones of unknown length, as the kernel makes them. */
static uint64_t rep_short(void)
{
    char *a = need(4096), *b = need(4096);
    uint64_t seed = 11, sum = 0;
    for (int round = 0; round < 2000000; round++) {
        uint64_t r = next_random(&seed);
        void *from = a + (r & 1023), *to = b + (r >> 10 & 1023);
        size_t n = r >> 57;
        __asm__ volatile("rep movsb" : "+S"(from), "+D"(to), "+c"(n) : : "memory");
        a[r >> 20 & 2047] = (char)r;
        sum += (unsigned char)b[r & 1023];
    }
    free(a), free(b);
    return sum;
}
#endif

const struct row memory_rows[] = {
    { "memcpy", copies, 0 },
    { "memcpy-short", small_copies, 0 },
    { "string-functions", string_functions, 0 },
#ifdef WITH_X86
    { "rep-movsb", rep_movsb, 0 },
    { "rep-stosb", rep_stosb, 0 },
    { "rep-movsb-short", rep_short, 0 },
#endif
    { 0, 0, 0 },
};
