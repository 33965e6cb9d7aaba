/* Frames of the guest protocol, see PROTOCOL.md. No I/O. */
#ifndef AGENT_FRAME_H
#define AGENT_FRAME_H

#include "util.h"

enum {
    FRAME_MAGIC = 0x31424d41,
    FRAME_HEADER = 16,
    FRAME_MAX_BODY = 65536,
    SYNC_LENGTH = 16,
};

enum message_type {
    MSG_HELLO = 0x01,
    MSG_SETUP,
    MSG_RUN,
    MSG_EXEC,
    MSG_SIGNAL,
    MSG_RESIZE,
    MSG_STDIN,
    MSG_CLOSE_STDIN,
    MSG_CREDIT,
    MSG_STATS,
    MSG_PROCESSES,
    MSG_TIME,
    MSG_ENTROPY,
    MSG_POWER_OFF,
    MSG_PING,
    MSG_DISK_SYNC,
    MSG_NET,
    MSG_UNPLUG,
    MSG_LIMITS = 0x14,
    MSG_FREEZE,
    MSG_THAW,
    MSG_RESUME,
    MSG_ATTACH,
    MSG_DETACH,
    MSG_CPUS,
    MSG_GROW,
    MSG_TREE = 0x13,
    MSG_LAST_FROM_HOST = 0x1d, /* 0x1c and 0x1d are of later versions */
    MSG_READY = 0x80,
    MSG_HELLO_OK,
    MSG_OK,
    MSG_ERROR,
    MSG_STDOUT,
    MSG_STDERR,
    MSG_STDOUT_END,
    MSG_STDERR_END,
    MSG_STDIN_CREDIT,
    MSG_EXITED,
    MSG_SYNCED,
    MSG_LOG,
};

struct frame {
    uint16_t type;
    uint32_t id;
    uint8_t *body; /* of the decoder, valid until the next call of decoder_feed's callback; may be changed in place */
    size_t length;
};

struct frame_handler {
    void (*frame)(void *context, struct frame *frame);
    void (*synced)(void *context);
    void *context;
};

/* Makes frames of bytes in whatever pieces they arrive. Starts in sync; a frame that is none puts it out of sync, and then
 * everything up to SYNC is dropped. */
struct decoder {
    bool out_of_sync;
    size_t matched; /* bytes of SYNC seen, out of sync */
    size_t have;    /* bytes of a frame, in sync */
    uint8_t bytes[FRAME_HEADER + FRAME_MAX_BODY];
};

void decoder_reset(struct decoder *d);
void decoder_feed(struct decoder *d, const uint8_t *data, size_t length, const struct frame_handler *handler);

void put_u16(uint8_t *at, uint16_t value);
void put_u32(uint8_t *at, uint32_t value);
void put_u64(uint8_t *at, uint64_t value);
uint16_t get_u16(const uint8_t *at);
uint32_t get_u32(const uint8_t *at);
uint64_t get_u64(const uint8_t *at);

void frame_header(uint8_t header[FRAME_HEADER], uint16_t type, uint32_t id, uint32_t length);

#endif
