/* Programs whose time goes into branches, pointers and tables. */
#include <stdlib.h>
#include <string.h>

#include "bench.h"

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static uint64_t sort(void)
{
    enum { N = 100000 };
    uint32_t *values = need(N * sizeof *values);
    uint64_t seed = 1, sum = 0;
    for (int round = 0; round < 6; round++) {
        for (int i = 0; i < N; i++)
            values[i] = (uint32_t)(next_random(&seed) >> 32);
        qsort(values, N, sizeof *values, by_value);
        sum += values[N / 2] + fold(values, 400);
    }
    free(values);
    return sum;
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static uint64_t string_sort(void)
{
    enum { N = 30000, LEN = 24 };
    char *text = need(N * LEN), **lines = need(N * sizeof *lines);
    uint64_t seed = 2, sum = 0;
    for (int round = 0; round < 5; round++) {
        for (int i = 0; i < N; i++) {
            char *s = lines[i] = text + i * LEN;
            memcpy(s, "prefix-", 7);
            uint64_t r = next_random(&seed);
            for (int k = 7; k < LEN - 1; k++, r = r >> 3 ^ r << 11)
                s[k] = (char)('a' + r % 4);
            s[LEN - 1] = 0;
        }
        qsort(lines, N, sizeof *lines, by_text);
        sum += fold(lines[N / 3], LEN);
    }
    free(text);
    free(lines);
    return sum;
}

/* Open addressing, linear probing. */
static uint64_t hash_table(void)
{
    enum { BITS = 16, SIZE = 1 << BITS };
    struct { uint64_t key; uint32_t count; } *slots = need(SIZE * sizeof *slots);
    uint64_t seed = 3, sum = 0;
    for (int i = 0; i < 6000000; i++) {
        uint64_t key = next_random(&seed) % 40000 + 1;
        uint32_t at = (uint32_t)((key * 0x9e3779b97f4a7c15ull) >> (64 - BITS));
        while (slots[at].key && slots[at].key != key)
            at = (at + 1) & (SIZE - 1);
        slots[at].key = key;
        sum += ++slots[at].count;
    }
    free(slots);
    return sum;
}

/* LZ77 with a hash of three bytes, greedy; then unpacked and compared. */
static uint64_t lz(void)
{
    enum { N = 1 << 19, HASH = 1 << 13 };
    unsigned char *in = need(N), *packed = need(2 * N), *out = need(N);
    static int last[HASH];
    uint64_t seed = 4, sum = 0;
    for (size_t i = 0; i < N;) {
        uint64_t r = next_random(&seed);
        size_t len = 3 + (r >> 8) % 20, from = i > 2000 ? i - 1 - (r >> 20) % 2000 : 0;
        for (size_t k = 0; k < len && i < N; k++, i++)
            in[i] = i > 2000 && (r & 3) ? in[from + k] : (unsigned char)('a' + (r >> (k % 32)) % 20);
    }
    for (int round = 0; round < 5; round++) {
        size_t o = 0;
        for (int i = 0; i < HASH; i++)
            last[i] = -1;
        for (size_t i = 0; i < N;) {
            size_t len = 0, distance = 0;
            if (i + 3 < N) {
                uint32_t h = ((uint32_t)in[i] << 16 | in[i + 1] << 8 | in[i + 2]) * 2654435761u >> 19;
                int from = last[h];
                last[h] = (int)i;
                if (from >= 0 && i - (size_t)from < 65536)
                    for (distance = i - (size_t)from; len < 255 && i + len < N && in[from + len] == in[i + len];)
                        len++;
            }
            if (len >= 4) {
                packed[o++] = 1, packed[o++] = (unsigned char)len;
                packed[o++] = (unsigned char)distance, packed[o++] = (unsigned char)(distance >> 8);
                i += len;
            } else {
                packed[o++] = 0, packed[o++] = in[i++];
            }
        }
        size_t n = 0;
        for (size_t i = 0; i < o;) {
            if (packed[i] == 0) {
                out[n++] = packed[i + 1];
                i += 2;
            } else {
                size_t len = packed[i + 1], distance = packed[i + 2] | (size_t)packed[i + 3] << 8;
                for (size_t k = 0; k < len; k++, n++)
                    out[n] = out[n - distance];
                i += 4;
            }
        }
        sum += o + (n == N && !memcmp(in, out, N));
    }
    free(in), free(packed), free(out);
    return sum;
}

/* A stack machine's loop with one switch: sums the numbers below n that a rule takes. */
enum { PUSH, ADD, MUL, DUP, SWAP, LESS, JZ, JUMP, LOAD, STORE, AND, HALT };

static uint64_t interpreter(void)
{
    static const int code[] = {
        LOAD, 0, PUSH, 700000, LESS, JZ, 31,                    /* while i < 700000      */
        LOAD, 0, DUP, MUL, PUSH, 7, AND, LOAD, 1, ADD, STORE, 1, /*   s += i * i & 7      */
        LOAD, 0, PUSH, 1, ADD, STORE, 0, PUSH, 0, JUMP, 0, 0,   /*   i++                 */
        LOAD, 1, HALT,
    };
    uint64_t sum = 0;
    for (int round = 0; round < 3; round++) {
        uint32_t stack[16], memory[2] = { 0, (uint32_t)round }, *sp = stack;
        for (const int *pc = code;;) {
            switch (*pc++) {
            case PUSH: *sp++ = (uint32_t)*pc++; break;
            case ADD: sp--, sp[-1] += sp[0]; break;
            case MUL: sp--, sp[-1] *= sp[0]; break;
            case AND: sp--, sp[-1] &= sp[0]; break;
            case DUP: sp[0] = sp[-1], sp++; break;
            case SWAP: { uint32_t t = sp[-1]; sp[-1] = sp[-2], sp[-2] = t; break; }
            case LESS: sp--, sp[-1] = sp[-1] < sp[0]; break;
            case JZ: pc = *--sp ? pc + 1 : code + *pc; break;
            case JUMP: sp--, pc = code + *pc; break;
            case LOAD: *sp++ = memory[*pc++]; break;
            case STORE: memory[*pc++] = *--sp; break;
            default: goto done;
            }
        }
    done:
        sum = sum * 31 + sp[-1];
    }
    return sum;
}

static char *text_of(size_t n)
{
    char *text = need(n + 1);
    uint64_t seed = 6;
    for (size_t i = 0; i < n; i++) {
        uint64_t r = next_random(&seed) >> 40;
        text[i] = (char)(r % 7 == 0 ? ' ' : r % 61 == 0 ? '\n' : r % 29 == 0 ? '0' + r % 10 : 'a' + r % 26);
    }
    return text;
}

/* Counts lines, words and letters of each kind, as wc and a lexer do. */
static uint64_t text_scan(void)
{
    enum { N = 1 << 20 };
    char *text = text_of(N);
    uint64_t lines = 0, words = 0, digits = 0, vowels = 0;
    for (int round = 0; round < 10; round++) {
        int in_word = 0;
        for (const char *p = text; *p; p++) {
            int space = *p == ' ' || *p == '\n';
            lines += *p == '\n';
            words += !in_word && !space;
            in_word = !space;
            digits += *p >= '0' && *p <= '9';
            switch (*p) {
            case 'a': case 'e': case 'i': case 'o': case 'u': vowels++; break;
            default: break;
            }
        }
    }
    free(text);
    return lines ^ words << 16 ^ digits << 32 ^ vowels << 40;
}

/* The states of (a|b)*c[d-m]+[0-9]?x? as a table, run over a text. */
static uint64_t automaton(void)
{
    enum { N = 1 << 20 };
    char *text = text_of(N);
    static unsigned char next[5][256];
    uint64_t matches = 0, longest = 0;
    for (int c = 0; c < 256; c++) {
        int letter = c >= 'd' && c <= 'm', digit = c >= '0' && c <= '9';
        next[0][c] = c == 'c' ? 2 : c == 'a' || c == 'b' ? 1 : 0;
        next[1][c] = next[0][c];
        next[2][c] = letter ? 3 : next[0][c];
        next[3][c] = letter ? 3 : digit || c == 'x' ? 4 : next[0][c];
        next[4][c] = c == 'x' ? 4 : next[0][c];
    }
    for (int round = 0; round < 20; round++) {
        unsigned state = 0, run = 0;
        for (size_t i = 0; i < N; i++) {
            state = next[state][(unsigned char)text[i]];
            run = state ? run + 1 : 0;
            matches += state == 4;
            longest = run > longest ? run : longest;
        }
    }
    free(text);
    return matches << 8 | (longest & 255);
}

/* A treap: insertions, searches, deletions, a walk. */
struct node { struct node *child[2]; uint32_t key, priority; };

static struct node *insert(struct node *n, struct node *fresh)
{
    if (!n)
        return fresh;
    int side = fresh->key > n->key;
    n->child[side] = insert(n->child[side], fresh);
    struct node *up = n->child[side];
    if (up->priority > n->priority) {
        n->child[side] = up->child[!side];
        up->child[!side] = n;
        return up;
    }
    return n;
}

static uint64_t walk(const struct node *n, unsigned depth)
{
    return n ? walk(n->child[0], depth + 1) + n->key * (uint64_t)depth + walk(n->child[1], depth + 1) : 0;
}

static uint64_t tree(void)
{
    enum { N = 60000 };
    struct node *nodes = need(N * sizeof *nodes), *root = 0;
    uint64_t seed = 7, found = 0;
    for (int i = 0; i < N; i++) {
        nodes[i].key = (uint32_t)(next_random(&seed) >> 44);
        nodes[i].priority = (uint32_t)next_random(&seed);
        root = insert(root, &nodes[i]);
    }
    for (int i = 0; i < 300000; i++) {
        uint32_t key = (uint32_t)(next_random(&seed) >> 44);
        const struct node *n = root;
        while (n && n->key != key)
            n = n->child[key > n->key];
        found += n != 0;
    }
    for (int round = 0; round < 10; round++)
        found += walk(root, 1);
    free(nodes);
    return found;
}

/* Calls through tables of functions, as objects make them. */
struct shape;
struct shape_class { uint32_t (*area)(const struct shape *), (*grow)(struct shape *, uint32_t); };
struct shape { const struct shape_class *class; uint32_t w, h; };

static uint32_t square_area(const struct shape *s) { return s->w * s->w; }
static uint32_t box_area(const struct shape *s) { return s->w * s->h; }
static uint32_t edge_area(const struct shape *s) { return 2 * (s->w + s->h); }
static uint32_t grow_w(struct shape *s, uint32_t by) { return s->w += by; }
static uint32_t grow_both(struct shape *s, uint32_t by) { s->h += by; return s->w += by; }
static const struct shape_class classes[] = {
    { square_area, grow_w }, { box_area, grow_both }, { edge_area, grow_w }, { box_area, grow_w },
};

static uint64_t virtual_calls(void)
{
    enum { N = 4096 };
    struct shape *shapes = need(N * sizeof *shapes);
    uint64_t seed = 8, sum = 0;
    for (int i = 0; i < N; i++) {
        shapes[i].class = &classes[next_random(&seed) % 4];
        shapes[i].w = (uint32_t)i, shapes[i].h = 3;
    }
    for (int round = 0; round < 1500; round++)
        for (int i = 0; i < N; i++) {
            struct shape *s = &shapes[i];
            sum += s->class->area(s) ^ s->class->grow(s, (uint32_t)round);
        }
    free(shapes);
    return sum;
}

const struct row structure_rows[] = {
    { "sort", sort, 0 },
    { "string-sort", string_sort, 0 },
    { "hash-table", hash_table, 0 },
    { "lz", lz, 0 },
    { "interpreter", interpreter, 0 },
    { "text-scan", text_scan, 0 },
    { "automaton", automaton, 0 },
    { "tree", tree, 0 },
    { "virtual-calls", virtual_calls, 0 },
    { 0, 0, 0 },
};
