/* The exponential moving average of weights, at the memory's bandwidth. */
#include <stdint.h>

/* A processor fetches ahead in one stretch of memory by what it saw there, and several keep more of its reads under way
   than one. Floats in a stretch, no power of two, for else all would meet in the same sets of the caches; in a line of
   these; and how far ahead is asked for. */
#define STRETCHES 8
#define STRETCH (16384 + 128)
#define LINE 16
#define AHEAD 64
#define BLOCK (STRETCHES * STRETCH)

typedef float line __attribute__((vector_size(4 * LINE), aligned(4)));

/* As torch.lerp for weights below 0.5; one rounding where the processor has it so. */
#define UPDATED(ema, master) (weight * ((master) - (ema)) + (ema))

#define UPDATE_BLOCK(name)                                                                                             \
    static void name(float *ema, const float *masters, float weight, int64_t count) {                                  \
        if (count < BLOCK) {                                                                                           \
            for (int64_t i = 0; i < count; i++) ema[i] = UPDATED(ema[i], masters[i]);                                  \
            return;                                                                                                    \
        }                                                                                                              \
        for (int64_t first = 0; first < STRETCH; first += LINE)                                                        \
            for (int64_t i = first; i < BLOCK; i += STRETCH) {                                                         \
                line *to = (line *)(ema + i);                                                                          \
                const line *from = (const line *)(masters + i);                                                        \
                __builtin_prefetch(ema + i + AHEAD);                                                                   \
                __builtin_prefetch(masters + i + AHEAD);                                                               \
                *to = UPDATED(*to, *from);                                                                             \
            }                                                                                                          \
    }

#ifdef __x86_64__
__attribute__((target("avx512f,fma"))) UPDATE_BLOCK(update_512)
__attribute__((target("avx2,fma"))) UPDATE_BLOCK(update_256)
#endif
UPDATE_BLOCK(update_any)

/* ema ← ema + weight·(masters − ema), of `count` floats, by the threads that OpenMP is set to use. */
void ema_update(float *ema, const float *masters, float weight, int64_t count) {
    void (*update)(float *, const float *, float, int64_t) = update_any;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) update = update_512;
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) update = update_256;
#endif
#pragma omp parallel for schedule(dynamic)
    for (int64_t begin = 0; begin < count; begin += BLOCK)
        update(ema + begin, masters + begin, weight, count - begin < BLOCK ? count - begin : BLOCK);
}
