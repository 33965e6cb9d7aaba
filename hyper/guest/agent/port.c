#include "port.h"
#include "fields.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PORTS "/sys/class/virtio-ports"
#define NAME "ambi.agent\n"

static int open_named(void) {
    DIR *ports = opendir(PORTS);
    int fd = -1;
    if (!ports)
        return -1;
    for (struct dirent *entry; fd < 0 && (entry = readdir(ports));) {
        char path[320], name[64];
        snprintf(path, sizeof(path), PORTS "/%s/name", entry->d_name);
        if (entry->d_name[0] == '.' || read_file(path, name, sizeof(name)) < 0 || strcmp(name, NAME) != 0)
            continue;
        snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
        fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    }
    closedir(ports);
    return fd;
}

/* The kernel names a port some time after the driver is there, and sends a uevent when it has. */
int port_open(struct port *port) {
    struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
    int uevents = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);
    if (uevents >= 0 && bind(uevents, (struct sockaddr *)&address, sizeof(address)) < 0)
        debug("uevents: %s", errno_text(errno));
    decoder_reset(&port->decoder);
    while ((port->fd = open_named()) < 0) {
        struct pollfd p = {.fd = uevents, .events = POLLIN};
        char event[4096];
        poll(&p, 1, 1000);
        while (uevents >= 0 && recv(uevents, event, sizeof(event), MSG_DONTWAIT) > 0)
            ;
    }
    if (uevents >= 0)
        close(uevents);
    return port->fd;
}

void port_read(struct port *port, const struct frame_handler *handler) {
    uint8_t bytes[32768];
    for (;;) {
        ssize_t n = read(port->fd, bytes, sizeof(bytes));
        if (n > 0) {
            decoder_feed(&port->decoder, bytes, (size_t)n, handler);
            continue;
        }
        if (n < 0 && errno == EINTR)
            continue;
        if (n == 0)
            decoder_reset(&port->decoder);
        return;
    }
}

size_t port_queued(const struct port *port) {
    return port->output.length - port->written;
}

static void advance(struct port *port, size_t n) {
    while (n) {
        if (port->rest == 0)
            port->rest = FRAME_HEADER + get_u32(port->output.data + port->written + 4);
        size_t step = n < port->rest ? n : port->rest;
        port->written += step;
        port->rest -= step;
        n -= step;
    }
    if (port->written == port->output.length) {
        port->written = port->output.length = 0;
    } else if (port->written > PORT_OUTPUT_HIGH) {
        buffer_drop_front(&port->output, port->written);
        port->written = 0;
    }
}

void port_flush(struct port *port) {
    while (port_queued(port)) {
        ssize_t n = write(port->fd, port->output.data + port->written, port_queued(port));
        if (n > 0)
            advance(port, (size_t)n);
        else if (n == 0 || errno != EINTR)
            return;
    }
}

void port_send_raw(struct port *port, uint16_t type, uint32_t id, const void *data, size_t length) {
    uint8_t header[FRAME_HEADER];
    size_t before = port->output.length;
    frame_header(header, type, id, (uint32_t)length);
    if (buffer_append(&port->output, header, sizeof(header)) && buffer_append(&port->output, data, length))
        return;
    port->output.length = before;
    debug("no memory for a message of %zu bytes", length);
}

void port_send(struct port *port, uint16_t type, uint32_t id, const struct buffer *body) {
    uint8_t frame[FRAME_MAX_BODY];
    size_t have = 0;
    struct fields fields = {body ? body->data : NULL, body ? body->length : 0};
    struct field field;
    while (fields.left && fields_next(&fields, &field)) {
        size_t size = FIELD_HEADER + field.length;
        if (have + size + FIELD_HEADER > sizeof(frame)) {
            put_u16(frame + have, FIELD_MORE);
            memset(frame + have + 2, 0, FIELD_HEADER - 2);
            port_send_raw(port, type, id, frame, have + FIELD_HEADER);
            have = 0;
        }
        memcpy(frame + have, field.data - FIELD_HEADER, size);
        have += size;
    }
    port_send_raw(port, type, id, frame, have);
}

void port_send_synced(struct port *port) {
    uint8_t header[FRAME_HEADER];
    struct buffer *output = &port->output;
    size_t at = port->written + port->rest;
    frame_header(header, MSG_SYNCED, 0, 0);
    if (!buffer_append(output, header, sizeof(header)))
        return;
    memmove(output->data + at + sizeof(header), output->data + at, output->length - sizeof(header) - at);
    memcpy(output->data + at, header, sizeof(header));
}
