/* Feeds what a fuzzed host says to the agent's own parsers: a file is cut into pieces by its first bytes, and every frame's
 * fields are walked, nested ones too. Built with -fsanitize=address,undefined; says how many frames it saw. */
#include "fields.h"
#include "frame.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned long frames, syncs, values;

static void walk(uint8_t *body, size_t length, int depth) {
    struct fields fields;
    struct field f;
    if (!fields_open(&fields, body, length))
        return;
    while (fields_next(&fields, &f)) {
        uint64_t number;
        free(field_string(&f));
        values += field_number(&f, &number);
        if (depth < 4)
            walk(f.data, f.length, depth + 1);
    }
}

static void on_frame(void *context, struct frame *frame) {
    (void)context;
    frames++;
    fields_end_with_more(frame->body, frame->length);
    uint8_t *copy = malloc(frame->length ? frame->length : 1);
    memcpy(copy, frame->body, frame->length);
    walk(copy, frame->length, 0);
    free(copy);
}

static void on_sync(void *context) {
    (void)context;
    syncs++;
}

static void feed(const char *path) {
    static uint8_t data[1 << 20];
    static struct decoder decoder;
    const struct frame_handler handler = {on_frame, on_sync, NULL};
    FILE *file = fopen(path, "rb");
    size_t length = file ? fread(data, 1, sizeof(data), file) : 0;
    if (file)
        fclose(file);
    decoder_reset(&decoder);
    size_t piece = length ? data[0] + 1u : 1;
    for (size_t at = 1; at < length; at += piece, piece = piece * 7 % 4099 + 1) {
        size_t size = piece < length - at ? piece : length - at;
        uint8_t *exact = malloc(size);
        memcpy(exact, data + at, size);
        decoder_feed(&decoder, exact, size, &handler);
        free(exact);
    }
}

int main(int count, char **arguments) {
    for (int i = 1; i < count; i++)
        feed(arguments[i]);
    printf("%lu %lu %lu\n", frames, syncs, values);
    return 0;
}
