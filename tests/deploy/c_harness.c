/* Runs networks on images from standard input, by every code that each has, and writes the logits to standard output: for each
   network and code one byte that says whether the code is there, and if so the logits of all images. networks.h includes the headers
   and names the networks. Memory is of exactly the stated size, aligned no further than a float, and full of numbers that are none. */
#include "networks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const paths[] = {"portable", "vector", "avx2", "avx512", "vnni"};

static void *memory(size_t bytes)
{
    char *found = malloc(bytes + 4);
    if (found == NULL)
        exit(3);
    memset(found, 0xff, bytes + 4);
    return found + 4;
}

static void release(void *memory)
{
    free((char *)memory - 4);
}

#define CHECK(NAME)                                                                                                   \
    static void check_##NAME(void)                                                                                    \
    {                                                                                                                 \
        static uint8_t images[IMAGES][NAME##_HEIGHT * NAME##_WIDTH * NAME##_CHANNELS];                                \
        size_t path, image;                                                                                           \
        if (fread(images, sizeof images, 1, stdin) != 1)                                                              \
            exit(4);                                                                                                  \
        for (path = 0; path < sizeof paths / sizeof *paths; path++) {                                                 \
            NAME##_context *context = memory(NAME##_CONTEXT_BYTES);                                                   \
            NAME##_workspace *workspace = memory(NAME##_WORKSPACE_BYTES);                                             \
            float *logits = memory(NAME##_CLASSES * sizeof *logits);                                                  \
            const int there = NAME##_init_path(context, paths[path]) == 0;                                            \
            putchar(there);                                                                                           \
            for (image = 0; there && image < IMAGES; image++) {                                                       \
                memset(workspace, 0xff, NAME##_WORKSPACE_BYTES);                                                      \
                NAME##_run(context, workspace, images[image], logits);                                                \
                fwrite(logits, sizeof *logits, NAME##_CLASSES, stdout);                                               \
            }                                                                                                         \
            if (there && strcmp(NAME##_path(context), paths[path]) != 0)                                              \
                exit(5);                                                                                              \
            release(context);                                                                                         \
            release(workspace);                                                                                       \
            release(logits);                                                                                          \
        }                                                                                                             \
    }

NETWORKS(CHECK)

#define CALL(NAME) check_##NAME();

int main(void)
{
    NETWORKS(CALL)
    return 0;
}
