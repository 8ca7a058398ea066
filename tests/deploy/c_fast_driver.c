/* Runs convolutions from standard input by the code of one instruction set, its argument, and writes the results to standard output.
   Exits with 77 where the processor lacks it. A case: what is done, the numbers of the results and of the scratch, the description's 17
   integers, and then the arrays, each behind its length: image, kernel, scale, shift, residual. Memory is of exactly that size, aligned no
   further than a number, and full of numbers that are none; behind kernels are 16 numbers of slack. What is done is 4 more where the kernel
   is read as bfloat16. */
#include <stddef.h>
#include <stdint.h>

typedef struct {
    int in_h, in_w, in_c, out_h, out_w, out_c, kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups;
    const uint16_t *kernel_bfloat16;
    const float *kernel, *scale, *shift, *residual;
    int relu, pool;
} net_convolution;

/* as the generated header says it */
#define net_FAST 1
#include "fast.c"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DIRECT, DEPTHWISE, WINOGRAD, TRANSFORM, KINDS };

typedef struct {
    const char *name;
    int there;
    void (*direct[2])(const net_convolution *, const float *, float *), (*depthwise[2])(const net_convolution *, const float *, float *);
    void (*winograd)(const net_convolution *, const float *, const float *, float *, float *);
    void (*transform)(const float *, int, int, float *), (*transform_bfloat16)(const uint16_t *, int, int, float *);
} code;

#define CODE(ISA, THERE) \
    {#ISA, THERE, {convolve_direct_##ISA, convolve_direct_bfloat16_##ISA}, {convolve_depthwise_##ISA, convolve_depthwise_bfloat16_##ISA}, \
     convolve_winograd_##ISA, transform_kernel_##ISA, transform_kernel_bfloat16_##ISA}

static float *memory(int floats)
{
    const size_t bytes = sizeof(float) * ((size_t)floats + 1);
    float *found = malloc(bytes);
    if (found == NULL)
        exit(3);
    memset(found, 0xff, bytes);
    return found + 1;
}

static void release(const float *memory)
{
    if (memory != NULL)
        free((float *)(uintptr_t)memory - 1);
}

static void get(void *to, size_t size, int count)
{
    if (fread(to, size, (size_t)count, stdin) != (size_t)count)
        exit(4);
}

static float *array(int slack)
{
    int length;
    float *found;
    get(&length, sizeof length, 1);
    if (length == 0)
        return NULL;
    found = memory(length + slack);
    get(found, sizeof(float), length);
    return found;
}

/* the upper halves of floats, at an address that no float has */
static uint16_t *bfloat16_of(const float *numbers, int count)
{
    const size_t bytes = sizeof(uint16_t) * ((size_t)count + 17);
    uint16_t *found = malloc(bytes);
    if (found == NULL)
        exit(3);
    memset(found++, 0xff, bytes);
    for (int i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, numbers + i, sizeof bits);
        if ((bits & 0xffff) != 0)
            exit(5);
        found[i] = (uint16_t)(bits >> 16);
    }
    return found;
}

static void transform(const code *with, const net_convolution *c, float *transformed)
{
    if (c->kernel_bfloat16 != NULL)
        with->transform_bfloat16(c->kernel_bfloat16, c->in_c, c->out_c, transformed);
    else
        with->transform(c->kernel, c->in_c, c->out_c, transformed);
}

static void put(const code *with, int what, int results, int scratch_floats)
{
    const int halved = what >= KINDS;
    net_convolution c;
    float *kernel, *x, *y = memory(results), *scratch = memory(scratch_floats), *transformed;
    get(&c.in_h, sizeof(int), 15);
    get(&c.relu, sizeof(int), 2);
    x = array(0);
    kernel = array(16);
    c.kernel_bfloat16 = halved ? bfloat16_of(kernel, c.kernel_h * c.kernel_w * (c.in_c / c.groups) * c.out_c) : NULL;
    c.kernel = halved ? NULL : kernel;
    c.scale = array(0);
    c.shift = array(0);
    c.residual = array(0);
    transformed = memory(36 * c.in_c * ((c.out_c + 15) / 16 * 16));
    what %= KINDS;
    if (what == TRANSFORM)
        transform(with, &c, y);
    else if (what == DIRECT)
        with->direct[halved](&c, x, y);
    else if (what == DEPTHWISE)
        with->depthwise[halved](&c, x, y);
    else {
        transform(with, &c, transformed);
        with->winograd(&c, transformed, x, y, scratch);
    }
    fwrite(y, sizeof(float), (size_t)results, stdout);
    release(x);
    release(y);
    release(scratch);
    release(transformed);
    release(kernel);
    if (halved)
        free((uint16_t *)(uintptr_t)c.kernel_bfloat16 - 1);
    release(c.scale);
    release(c.shift);
    release(c.residual);
}

int main(int argc, char **argv)
{
    const code codes[] = {
#if defined(__x86_64__)
        CODE(avx512, __builtin_cpu_supports("avx512f") != 0),
        CODE(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
#endif
        CODE(vector, 1),
    };
    for (size_t i = 0; argc == 2 && i < sizeof codes / sizeof *codes; ++i) {
        int head[3];
        if (strcmp(codes[i].name, argv[1]) != 0)
            continue;
        if (!codes[i].there)
            return 77;
        while (fread(head, sizeof(int), 3, stdin) == 3)
            put(&codes[i], head[0], head[1], head[2]);
        return 0;
    }
    return 77;
}
