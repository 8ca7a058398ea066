/* Prints the bits of a network's logits for the images in images.h. */
#include "net.h"

#include <stdio.h>
#include <string.h>

#include "images.h"

static net_context context;
static net_workspace workspace;

int main(void)
{
    size_t image, k;
    if (net_init(&context) != 0 || strcmp(net_path(&context), "portable") != 0)
        return 1;
    for (image = 0; image < sizeof images / sizeof *images; image++) {
        float logits[net_CLASSES];
        net_run(&context, &workspace, images[image], logits);
        for (k = 0; k < net_CLASSES; k++) {
            uint32_t bits;
            memcpy(&bits, logits + k, sizeof bits);
            printf("%08lx\n", (unsigned long)bits);
        }
    }
    return 0;
}
