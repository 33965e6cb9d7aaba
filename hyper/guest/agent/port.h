/* The virtio-serial port to the host: bytes in, frames out. */
#ifndef AGENT_PORT_H
#define AGENT_PORT_H

#include "frame.h"

enum { PORT_OUTPUT_HIGH = 128 * 1024 }; /* bytes queued above which no more output of processes is read */

struct port {
    int fd;
    struct buffer output;
    size_t written; /* of `output`, from its front */
    size_t rest;    /* bytes after `written` that belong to a frame whose front the host has */
    struct decoder decoder;
};

/* Waits until the host's device names a port `ambi.agent`, then opens it. Returns its fd or -1. */
int port_open(struct port *port);
/* Reads what there is and hands its frames over. The port's end means that the host is away, and nothing else. */
void port_read(struct port *port, const struct frame_handler *handler);
void port_flush(struct port *port);
size_t port_queued(const struct port *port);

/* Queue one message; fields are split into frames. Without memory the message is dropped. */
void port_send(struct port *port, uint16_t type, uint32_t id, const struct buffer *body);
void port_send_raw(struct port *port, uint16_t type, uint32_t id, const void *data, size_t length);
/* The answer to SYNC goes before every frame of which the host has nothing yet. */
void port_send_synced(struct port *port);

#endif
