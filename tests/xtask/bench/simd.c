/* Vector instructions of x86: pixels, and hashing and encryption by instruction. */
#include <cpuid.h>
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"

enum { PIXELS = 1 << 14 };

/* Blends one row of pixels over another by 8-bit alpha: d + (s - d) * a / 256. */
static uint64_t pixels(void)
{
    uint8_t *s = need(4 * PIXELS + 16), *d = need(4 * PIXELS + 16);
    for (int i = 0; i < 4 * PIXELS; i++)
        s[i] = (uint8_t)(i * 5), d[i] = (uint8_t)(i * 3 + 1);
    const __m128i zero = _mm_setzero_si128();
    for (int round = 0; round < 3000; round++) {
        const __m128i alpha = _mm_set1_epi16((short)(round & 127));
        for (int i = 0; i < 4 * PIXELS; i += 16) {
            __m128i a = _mm_loadu_si128((const __m128i *)(s + i)), b = _mm_loadu_si128((const __m128i *)(d + i));
            __m128i al = _mm_unpacklo_epi8(a, zero), ah = _mm_unpackhi_epi8(a, zero);
            __m128i bl = _mm_unpacklo_epi8(b, zero), bh = _mm_unpackhi_epi8(b, zero);
            bl = _mm_add_epi16(bl, _mm_srai_epi16(_mm_mullo_epi16(_mm_sub_epi16(al, bl), alpha), 8));
            bh = _mm_add_epi16(bh, _mm_srai_epi16(_mm_mullo_epi16(_mm_sub_epi16(ah, bh), alpha), 8));
            _mm_storeu_si128((__m128i *)(d + i), _mm_packus_epi16(bl, bh));
        }
        s[round & 4095] ^= d[round & 8191];
    }
    uint64_t value = fold(d, 4 * PIXELS);
    free(s), free(d);
    return value;
}

/* Single precision, four at a time: a filter over samples. */
static uint64_t filter(void)
{
    enum { N = 8192, TAPS = 16 };
    float *x = need((N + TAPS) * sizeof *x), *y = need(N * sizeof *y);
    for (int i = 0; i < N + TAPS; i++)
        x[i] = (float)(i % 37) * 0.125f - 2;
    for (int round = 0; round < 1000; round++) {
        for (int i = 0; i < N; i += 4) {
            __m128 sum = _mm_setzero_ps();
            for (int t = 0; t < TAPS; t++)
                sum = _mm_add_ps(sum, _mm_mul_ps(_mm_loadu_ps(x + i + t), _mm_set1_ps(0.0625f * (float)(t - 7))));
            _mm_storeu_ps(y + i, _mm_max_ps(_mm_sqrt_ps(_mm_mul_ps(sum, sum)), _mm_set1_ps(0.01f)));
        }
        x[round] += y[round * 5 & 8191];
    }
    uint64_t value = fold(y, N * sizeof *y);
    free(x), free(y);
    return value;
}

static unsigned leaf7_ebx(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) ? b : 0;
}

static unsigned leaf1_ecx(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) ? c : 0;
}

static int has_aes(void) { return leaf1_ecx() >> 25 & 1; }
static int has_clmul(void) { return (leaf1_ecx() & 0x80202u) == 0x80202u; }
static int has_sha(void) { return (leaf7_ebx() >> 29 & 1) && (leaf1_ecx() & 0x80200u) == 0x80200u; }

static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

/* Ten rounds of AES over blocks in counter mode, with made-up round keys. */
static __attribute__((target("aes,sse2"))) uint64_t aes(void)
{
    __m128i key[11], counter = _mm_setzero_si128(), sum = counter;
    for (int i = 0; i < 11; i++)
        key[i] = _mm_set_epi32(i * 77, i * 13 + 1, ~i, i << 20);
    for (int n = 0; n < 3000000; n++) {
        __m128i block = _mm_xor_si128(counter, key[0]);
        for (int r = 1; r < 10; r++)
            block = _mm_aesenc_si128(block, key[r]);
        sum = _mm_xor_si128(sum, _mm_aesenclast_si128(block, key[10]));
        counter = _mm_add_epi64(counter, _mm_set_epi32(0, 0, 0, 1));
    }
    return fold(&sum, sizeof sum);
}

/* The rounds of SHA-256 by its instructions; the message schedule too. */
static __attribute__((target("sha,sse4.1"))) uint64_t sha(void)
{
    __m128i abef = _mm_set_epi32(1, 2, 3, 4), cdgh = _mm_set_epi32(5, 6, 7, 8);
    __m128i w[4] = { abef, cdgh, _mm_set1_epi32(0x5a827999), _mm_set1_epi32(0x6ed9eba1) };
    for (int n = 0; n < 1500000; n++) {
        __m128i x = _mm_add_epi32(w[n & 3], _mm_set1_epi32(n));
        cdgh = _mm_sha256rnds2_epu32(cdgh, abef, x);
        abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(x, 0x0e));
        __m128i t = _mm_sha256msg1_epu32(w[n & 3], w[(n + 1) & 3]);
        t = _mm_add_epi32(t, _mm_alignr_epi8(w[(n + 3) & 3], w[(n + 2) & 3], 4));
        w[n & 3] = _mm_sha256msg2_epu32(t, w[(n + 3) & 3]);
    }
    __m128i value = _mm_xor_si128(abef, cdgh);
    return fold(&value, sizeof value);
}

/* Folding by carry-less multiplication, as fast CRCs do. */
static __attribute__((target("pclmul,sse4.1"))) uint64_t clmul(void)
{
    uint8_t *data = need(1 << 16);
    for (int i = 0; i < 1 << 16; i++)
        data[i] = (uint8_t)(i * 11);
    const __m128i k = _mm_set_epi64x(0x1751997d0, 0x0ccaa009e);
    __m128i crc = _mm_set1_epi32(1);
    for (int round = 0; round < 1500; round++)
        for (int i = 0; i < 1 << 16; i += 16) {
            __m128i high = _mm_clmulepi64_si128(crc, k, 0x11), low = _mm_clmulepi64_si128(crc, k, 0x00);
            crc = _mm_xor_si128(_mm_xor_si128(high, low), _mm_loadu_si128((const __m128i *)(data + i)));
        }
    free(data);
    return fold(&crc, sizeof crc);
}

/* Eight floats at a time with fused multiplication and addition. */
static __attribute__((target("avx2,fma"))) uint64_t avx2(void)
{
    enum { N = 8192 };
    float *x = need(N * sizeof *x), *y = need(N * sizeof *y);
    for (int i = 0; i < N; i++)
        x[i] = (float)(i % 29) * 0.25f;
    for (int round = 0; round < 8000; round++) {
        const __m256 f = _mm256_set1_ps(0.5f + (float)(round & 1023) * 1e-4f);
        __m256i count = _mm256_setzero_si256();
        for (int i = 0; i < N; i += 8) {
            __m256 v = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), f, _mm256_mul_ps(_mm256_loadu_ps(y + i), f));
            count = _mm256_add_epi32(count, _mm256_cvtps_epi32(v));
            _mm256_storeu_ps(y + i, _mm256_min_ps(v, _mm256_set1_ps(100)));
        }
        x[round & 8191] += (float)(_mm256_extract_epi32(count, 3) & 7);
    }
    uint64_t value = fold(y, N * sizeof *y);
    free(x), free(y);
    return value;
}

const struct row simd_rows[] = {
    { "pixels", pixels, 0 },
    { "filter", filter, 0 },
    { "aes-ni", aes, has_aes },
    { "sha-ni", sha, has_sha },
    { "clmul", clmul, has_clmul },
    { "avx2-fma", avx2, has_avx2 },
    { 0, 0, 0 },
};
