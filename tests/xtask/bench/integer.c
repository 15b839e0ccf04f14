/* Arithmetic on integers: hashes, checksums, big numbers, recursion. */
#include <string.h>

#include "bench.h"

/* SHA-256 (FIPS 180-4) in C. Its constants are computed as the standard defines them. */
static uint32_t sha_k[64], sha_start[8];

#define ROTR(x, n) ((x) >> (n) | (x) << (32 - (n)))

/* Fractional bits of the square (cube) root of n: floor(root(n) * 2^32) mod 2^32. */
static uint64_t integer_root(unsigned n, int cube)
{
    uint64_t low = 0, high = (uint64_t)24 << 32;
    while (high - low > 1) {
        uint64_t mid = low + (high - low) / 2;
        /* Compare mid^2 with n * 2^64, mid^3 with n * 2^96, in pieces of 32 bits. */
        uint32_t product[4] = { (uint32_t)mid, (uint32_t)(mid >> 32), 0, 0 };
        for (int times = cube ? 2 : 1; times > 0; times--) {
            uint32_t next[4];
            uint64_t carry = 0;
            for (int i = 0; i < 4; i++) {
                uint64_t t = (uint64_t)product[i] * (uint32_t)mid + (carry & 0xffffffff);
                uint64_t up = carry >> 32;
                if (i > 0) {
                    uint64_t cross = (uint64_t)product[i - 1] * (mid >> 32);
                    up += cross >> 32;
                    t += cross & 0xffffffff;
                }
                next[i] = (uint32_t)t;
                carry = (t >> 32) + up;
            }
            memcpy(product, next, sizeof product);
        }
        int above = cube ? product[3] >= n : product[2] >= n || product[3] != 0;
        if (above)
            high = mid;
        else
            low = mid;
    }
    return low;
}

static void sha_prepare(void)
{
    int found = 0;
    for (unsigned n = 2; found < 64; n++) {
        int prime = 1;
        for (unsigned d = 2; d * d <= n; d++)
            prime &= n % d != 0;
        if (!prime)
            continue;
        sha_k[found] = (uint32_t)integer_root(n, 1);
        if (found < 8)
            sha_start[found] = (uint32_t)integer_root(n, 0);
        found++;
    }
}

static void sha_block(uint32_t state[8], const unsigned char *p)
{
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | p[4 * i + 1] << 16 | p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (ROTR(a, 7) ^ ROTR(a, 18) ^ a >> 3) + w[i - 7] + (ROTR(b, 17) ^ ROTR(b, 19) ^ b >> 10);
    }
    memcpy(s, state, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t e = s[4], a = s[0];
        uint32_t t1 = s[7] + (ROTR(e, 6) ^ ROTR(e, 11) ^ ROTR(e, 25)) + ((e & s[5]) ^ (~e & s[6])) + sha_k[i] + w[i];
        uint32_t t2 = (ROTR(a, 2) ^ ROTR(a, 13) ^ ROTR(a, 22)) + ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
        s[7] = s[6], s[6] = s[5], s[5] = e, s[4] = s[3] + t1;
        s[3] = s[2], s[2] = s[1], s[1] = a, s[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++)
        state[i] += s[i];
}

static uint64_t sha256(void)
{
    unsigned char data[4096];
    uint32_t state[8];
    sha_prepare();
    memcpy(state, sha_start, sizeof state);
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (unsigned char)(i * 7);
    for (int round = 0; round < 5000; round++)
        for (size_t at = 0; at < sizeof data; at += 64)
            sha_block(state, data + at);
    return fold(state, sizeof state);
}

/* CRC-32 (IEEE 802.3), a table of bytes. */
static uint64_t crc32(void)
{
    uint32_t table[256], crc = ~0u;
    unsigned char *data = need(1 << 16);
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? c >> 1 ^ 0xedb88320u : c >> 1;
        table[i] = c;
    }
    for (size_t i = 0; i < 1 << 16; i++)
        data[i] = (unsigned char)(i * 31 + (i >> 8));
    for (int round = 0; round < 700; round++)
        for (size_t i = 0; i < 1 << 16; i++)
            crc = table[(crc ^ data[i]) & 255] ^ crc >> 8;
    return crc;
}

static __attribute__((noinline)) unsigned fib(unsigned n)
{
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

static uint64_t recursion(void)
{
    /* Calls and returns, little else. */
    uint64_t sum = 0;
    for (int round = 0; round < 4; round++)
        sum += fib(33 + (round & 1));
    return sum;
}

/* Schoolbook multiplication and addition with carries. */
#define WORDS 256

static uint64_t bigint(void)
{
    static uint32_t a[WORDS], b[WORDS], product[2 * WORDS];
    uint64_t seed = 5, sum = 0;
    for (int i = 0; i < WORDS; i++)
        a[i] = (uint32_t)next_random(&seed), b[i] = (uint32_t)next_random(&seed);
    for (int round = 0; round < 900; round++) {
        memset(product, 0, sizeof product);
        for (int i = 0; i < WORDS; i++) {
            uint64_t carry = 0;
            for (int j = 0; j < WORDS; j++) {
                uint64_t t = (uint64_t)a[i] * b[j] + product[i + j] + carry;
                product[i + j] = (uint32_t)t;
                carry = t >> 32;
            }
            product[i + WORDS] = (uint32_t)carry;
        }
        unsigned carry = 0;
        for (int pass = 0; pass < 16; pass++)
            for (int i = 0; i < WORDS; i++) {
                uint64_t t = (uint64_t)a[i] + product[i + WORDS] + carry;
                a[i] = (uint32_t)t;
                carry = t >> 32 != 0;
            }
        sum += product[WORDS] + a[0];
    }
    return sum ^ fold(a, sizeof a);
}

/* Division and remainder: primes by trial, and a sum of digits. */
static uint64_t division(void)
{
    uint64_t sum = 0;
    for (uint32_t n = 3; n < 250000; n += 2) {
        uint32_t d = 3;
        while (d * d <= n && n % d)
            d += 2;
        if (d * d > n)
            sum += n;
    }
    for (uint64_t n = 1; n < 500000; n++)
        for (uint64_t v = n * 0x9e3779b97f4aull; v; v /= 10)
            sum += v % 10;
    return sum;
}

const struct row integer_rows[] = {
    { "sha256-c", sha256, 0 },
    { "crc32", crc32, 0 },
    { "recursion", recursion, 0 },
    { "bigint", bigint, 0 },
    { "division", division, 0 },
    { 0, 0, 0 },
};
