/* What the CPU kernels take in C: a yardstick for measure.py. One shard, up to 64 rows; estimates of 1, 3 or 5.
 *
 * The hash is that of hvd_sketch/hashing.py, but walked instead of evaluated: along equal steps a cubic's values follow
 * from three additions in the field. Each thread takes a run of coordinates, reads them once for all rows and adds them
 * to a table of its own, so sums are rounded in another order than the package's: whole numbers come out equal. */

#include <omp.h>
#include <stdint.h>
#include <string.h>

enum { PRIME = 0x7fffffff, MAX_BLOCK = 256, MAX_ROWS = 64, WORD = 16, GROUP = 16 };
enum { AHEAD = 3 }; /* blocks whose cells are fetched early: of 25 M coordinates 18 ms, with 1 block 20 (Zen 3) */
#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 }; /* gcc 12 makes vectors of 16 pass through memory where there are none of that length */
#endif
enum { PARTS = WORD / LANES };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, count) for (int64_t i = 0; i < (count); i++)
#define LEAST(a, b) ((a) < (b) ? (a) : (b))
#define GREATEST(a, b) ((a) > (b) ? (a) : (b))

typedef struct {
    const uint64_t *signs, *offsets; /* coefficients [rows, 4] */
    int64_t dim, rows, cols, block;
} hash_t;
typedef struct { words at[PARTS][4]; } walk_t; /* a cubic at 16 points in sequence, and its differences over 16 */
typedef struct { /* of 16 blocks, which have as many sign words as one has lanes */
    walk_t sign_walks[MAX_ROWS], offset_walks[MAX_ROWS];
    uint32_t signs[MAX_ROWS][MAX_BLOCK];
    int64_t columns[MAX_ROWS][GROUP + AHEAD];
} group_t;

static uint64_t cubic(const uint64_t *c, uint64_t x) {
    return (((c[3] * x + c[2]) % PRIME * x + c[1]) % PRIME * x + c[0]) % PRIME;
}

static void walk_from(walk_t *walk, const uint64_t *coefficients, uint64_t x) {
    EACH(i, 16) {
        uint64_t d[4];
        EACH(step, 4) d[step] = cubic(coefficients, (x + i + 16 * step) % PRIME);
        for (int order = 1; order < 4; order++)
            for (int step = 3; step >= order; step--) d[step] = (d[step] + PRIME - d[step - 1]) % PRIME;
        EACH(order, 4) walk->at[i / LANES][order][i % LANES] = d[order];
    }
}

INLINE words added(words a, words b) { /* in the field: a sum below PRIME wraps when PRIME is taken off */
    words sum = a + b, less = sum - PRIME;
    EACH(l, LANES) sum[l] = LEAST(sum[l], less[l]);
    return sum;
}

INLINE void walk_on(walk_t *walk, uint32_t *values, int64_t steps) {
    EACH(part, PARTS) {
        words *at = walk->at[part], d0 = at[0], d1 = at[1], d2 = at[2], d3 = at[3];
        EACH(step, steps) {
            memcpy(values + 16 * step + part * LANES, &d0, sizeof d0);
            d0 = added(d0, d1), d1 = added(d1, d2), d2 = added(d2, d3);
        }
        at[0] = d0, at[1] = d1, at[2] = d2;
    }
}

static void start_at(group_t *group, const hash_t *hash, int64_t number) {
    EACH(row, hash->rows) {
        walk_from(&group->sign_walks[row], hash->signs + 4 * row, number * hash->block);
        walk_from(&group->offset_walks[row], hash->offsets + 4 * row, number * GROUP);
    }
}

static void fill(group_t *group, const hash_t *hash, int64_t number, int64_t row) {
    uint32_t offsets[GROUP], *signs = group->signs[row];
    walk_on(&group->offset_walks[row], offsets, 1);
    EACH(i, GROUP + AHEAD) group->columns[row][i] = offsets[LEAST(i, GROUP - 1)] * hash->cols >> 31;
    if (hash->block >= WORD) walk_on(&group->sign_walks[row], signs, hash->block / WORD);
    else EACH(i, hash->block) signs[i] = cubic(hash->signs + 4 * row, number * hash->block + i);
}

INLINE floats flipped(const float *values, uint32_t word, int64_t bit) { /* negated where bit, bit + 1 … are set */
    words shifts;
    EACH(l, LANES) shifts[l] = 31 - l - bit;
    return (floats)((words)*(const unaligned *)values ^ ((word << shifts) & 0x80000000u));
}

static void add_group(group_t *group, const hash_t *hash, float *table, const float *v, int64_t number, int64_t row) {
    const int64_t block = hash->block, cols = hash->cols, *columns = group->columns[row];
    const uint32_t *signs = group->signs[row];
    float *cells = table + row * cols;
    fill(group, hash, number, row);
    EACH(i, GROUP) {
        int64_t column = columns[i], first = (number * GROUP + i) * block, lanes = LEAST(block, hash->dim - first);
        for (int64_t l = 0; l < block; l += 16) __builtin_prefetch(cells + columns[i + AHEAD] + l, 1);
        if (lanes == block && block >= WORD && column + block <= cols) {
            for (int64_t l = 0; l < block; l += WORD) EACH(part, PARTS) {
                int64_t lane = l + part * LANES;
                uint32_t word = signs[(i * block + l) / WORD];
                *(unaligned *)(cells + column + lane) += flipped(v + first + lane, word, part * LANES);
            }
        } else EACH(l, lanes) { /* wraps, or is cut short by the vector's end, or shares a word with others */
            int64_t cell = column + l < cols ? column + l : column + l - cols, bit = i * block + l;
            cells[cell] += signs[bit / WORD] >> bit % WORD & 1 ? -v[first + l] : v[first + l];
        }
    }
}

/* With ``u`` first u <- momentum u + g, v <- v + u; then table += sketch(v). scratch: [most_threads - 1] tables. */
void sketch(const hash_t *hash, float *table, float *scratch, float *u, float *v, const float *g, float momentum,
            int most_threads) {
    const int64_t cells = hash->rows * hash->cols, size = GROUP * hash->block, groups = (hash->dim - 1) / size + 1;
#pragma omp parallel num_threads(most_threads)
    {
        int64_t t = omp_get_thread_num(), threads = omp_get_num_threads(), begin = t * groups / threads;
        float *own = t ? memset(scratch + (t - 1) * cells, 0, cells * sizeof(float)) : table;
        group_t group;
        start_at(&group, hash, begin);
        for (int64_t number = begin; number < (t + 1) * groups / threads; number++) {
            int64_t first = number * size, end = LEAST(first + size, hash->dim);
            if (u) for (int64_t i = first; i < end; i++) v[i] += u[i] = momentum * u[i] + g[i];
            EACH(row, hash->rows) add_group(&group, hash, own, v, number, row);
        }
#pragma omp barrier
        EACH(other, threads - 1)
            for (int64_t i = t * cells / threads; i < (t + 1) * cells / threads; i++)
                table[i] += scratch[other * cells + i];
    }
}

INLINE void sort(floats *a, floats *b) {
    floats less, more;
    EACH(l, LANES) less[l] = LEAST((*a)[l], (*b)[l]);
    EACH(l, LANES) more[l] = GREATEST((*a)[l], (*b)[l]);
    *a = less, *b = more;
}

INLINE floats median(floats *vote, int64_t rows) {
    if (rows == 1) return vote[0];
    if (rows == 5) { /* the median of those left when the least and the greatest of the first four are dropped */
        sort(vote, vote + 1), sort(vote + 2, vote + 3), sort(vote, vote + 2), sort(vote + 1, vote + 3);
        vote[0] = vote[4];
    }
    sort(vote, vote + 1), sort(vote + 1, vote + 2), sort(vote, vote + 1);
    return vote[1];
}

INLINE void estimate_run(const hash_t *hash, float *out, const float *table, int64_t begin, int64_t end, int64_t rows) {
    const int64_t block = hash->block, cols = hash->cols;
    float copies[5][MAX_BLOCK], spare[MAX_BLOCK];
    group_t group;
    start_at(&group, hash, begin);
    for (int64_t b = begin * GROUP, i = 0; b < end * GROUP && b * block < hash->dim; b++, i = b % GROUP) {
        const int64_t lanes = LEAST(block, hash->dim - b * block);
        const float *cells[5];
        EACH(row, rows) {
            if (i == 0) fill(&group, hash, b / GROUP, row);
            int64_t column = group.columns[row][i], unwrapped = LEAST(block, cols - column);
            for (int64_t l = 0; l < block; l += 16)
                __builtin_prefetch(table + row * cols + group.columns[row][i + 1] + l);
            cells[row] = table + row * cols + column;
            if (unwrapped < block || block < WORD) {
                memcpy(copies[row], cells[row], unwrapped * sizeof(float));
                memcpy(copies[row] + unwrapped, table + row * cols, (block - unwrapped) * sizeof(float));
                cells[row] = copies[row];
            }
        }
        float *target = lanes == block && block >= WORD ? out + b * block : spare;
        for (int64_t l = 0; l < block; l += WORD) EACH(part, PARTS) {
            floats votes[5];
            EACH(row, rows) {
                uint32_t word = group.signs[row][(i * block + l) / WORD];
                votes[row] = flipped(cells[row] + l + part * LANES, word, i * block % WORD + part * LANES);
            }
            *(unaligned *)(target + l + part * LANES) = median(votes, rows);
        }
        if (target == spare) memcpy(out + b * block, target, lanes * sizeof(float));
    }
}

void estimate(const hash_t *hash, float *out, const float *table, int most_threads) {
    const int64_t groups = (hash->dim - 1) / (GROUP * hash->block) + 1;
#pragma omp parallel num_threads(most_threads)
    {
        int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
        int64_t begin = t * groups / threads, end = (t + 1) * groups / threads;
        if (hash->rows == 1) estimate_run(hash, out, table, begin, end, 1); /* numbers of rows the compiler unrolls */
        if (hash->rows == 3) estimate_run(hash, out, table, begin, end, 3);
        if (hash->rows == 5) estimate_run(hash, out, table, begin, end, 5);
    }
}
