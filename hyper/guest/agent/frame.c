#include "frame.h"

#include <string.h>

static const uint8_t SYNC[SYNC_LENGTH] = {0xf3, 0x9a, 0x1c, 0x77, 'a',  'm',  'b',  'i',
                                          's',  'y',  'n',  'c',  0x0d, 0x0a, 0x00, 0xe1};

void put_u16(uint8_t *at, uint16_t value) {
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
}

void put_u32(uint8_t *at, uint32_t value) {
    put_u16(at, (uint16_t)value);
    put_u16(at + 2, (uint16_t)(value >> 16));
}

void put_u64(uint8_t *at, uint64_t value) {
    put_u32(at, (uint32_t)value);
    put_u32(at + 4, (uint32_t)(value >> 32));
}

uint16_t get_u16(const uint8_t *at) {
    return (uint16_t)(at[0] | at[1] << 8);
}

uint32_t get_u32(const uint8_t *at) {
    return get_u16(at) | (uint32_t)get_u16(at + 2) << 16;
}

uint64_t get_u64(const uint8_t *at) {
    return get_u32(at) | (uint64_t)get_u32(at + 4) << 32;
}

void frame_header(uint8_t header[FRAME_HEADER], uint16_t type, uint32_t id, uint32_t length) {
    put_u32(header, FRAME_MAGIC);
    put_u32(header + 4, length);
    put_u16(header + 8, type);
    put_u16(header + 10, 0);
    put_u32(header + 12, id);
}

void decoder_reset(struct decoder *d) {
    d->out_of_sync = false;
    d->matched = 0;
    d->have = 0;
}

static bool header_is_valid(const uint8_t *header) {
    uint16_t type = get_u16(header + 8);
    return get_u32(header) == FRAME_MAGIC && get_u32(header + 4) <= FRAME_MAX_BODY && type >= MSG_HELLO &&
           type <= MSG_LAST_FROM_HOST && get_u16(header + 10) == 0;
}

/* How many bytes were used. The first byte of SYNC is nowhere else in it, so a mismatch never has to go back. */
static size_t hunt(struct decoder *d, const uint8_t *data, size_t length, const struct frame_handler *handler) {
    for (size_t i = 0; i < length; i++) {
        if (data[i] != SYNC[d->matched])
            d->matched = 0;
        if (data[i] == SYNC[d->matched])
            d->matched++;
        if (d->matched == SYNC_LENGTH) {
            decoder_reset(d);
            handler->synced(handler->context);
            return i + 1;
        }
    }
    return length;
}

static void take_header(struct decoder *d, const struct frame_handler *handler) {
    if (header_is_valid(d->bytes))
        return;
    uint8_t bad[FRAME_HEADER];
    memcpy(bad, d->bytes, sizeof(bad));
    decoder_reset(d);
    d->out_of_sync = true;
    size_t used = hunt(d, bad, sizeof(bad), handler);
    memcpy(d->bytes, bad + used, sizeof(bad) - used);
    d->have = sizeof(bad) - used;
}

void decoder_feed(struct decoder *d, const uint8_t *data, size_t length, const struct frame_handler *handler) {
    while (length || (!d->out_of_sync && d->have >= FRAME_HEADER)) {
        if (d->out_of_sync) {
            size_t used = hunt(d, data, length, handler);
            data += used;
            length -= used;
            continue;
        }
        size_t want = FRAME_HEADER;
        if (d->have >= FRAME_HEADER)
            want += get_u32(d->bytes + 4);
        size_t take = want - d->have < length ? want - d->have : length;
        memcpy(d->bytes + d->have, data, take);
        d->have += take;
        data += take;
        length -= take;
        if (d->have < want)
            return;
        if (want == FRAME_HEADER) {
            take_header(d, handler);
            if (d->have < FRAME_HEADER || get_u32(d->bytes + 4) > 0)
                continue;
        }
        struct frame frame = {get_u16(d->bytes + 8), get_u32(d->bytes + 12), d->bytes + FRAME_HEADER, d->have - FRAME_HEADER};
        d->have = 0;
        handler->frame(handler->context, &frame);
    }
}
